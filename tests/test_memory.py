"""Slots of different sizes in one buffer: they never overlap, and memory that became free serves any size again."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.random_tenants import Factory
from tests.tiny import tiny_backbone
from vbert.arena import Arena
from vbert.checkpoint import write_tenant
from vbert.formats.transformers_folder import read_backbone
from vbert.header import parse_header
from vbert.memory import AddressSpace, Slabs, mapped
from vbert.selftest import check_outputs
from vbert.tenant import SelfTest

SIZES = (300, 5_000, 40_000)  # numbers: slots of 1 KB to 160 KB
MIB = 2**20


def slabs(num_bytes=8 * MIB):
    return Slabs(torch.zeros(num_bytes, dtype=torch.uint8))


def regions(memory):
    return [memory.region([(size, torch.float32), (size // 2, torch.int32)]) for size in SIZES]


def fill(region, slot, value):
    for array in region.arrays:
        array[slot] = value


def holds(region, slot, value):
    return all(bool((array[slot] == value).all()) for array in region.arrays)


@pytest.mark.parametrize("memory", [slabs, lambda: AddressSpace(8 * MIB)], ids=["slabs", "address space"])
@given(steps=st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 100)), max_size=80))
def test_nothing_that_is_written_into_one_slot_shows_in_another(memory, steps):
    rooms, taken = regions(memory()), []
    for i, (which, take, pick) in enumerate(steps):
        if take and (slot := rooms[which].take()) is not None:
            fill(rooms[which], slot, i)
            taken.append((which, slot, i))
        elif taken:
            which, slot, value = taken.pop(pick % len(taken))
            assert holds(rooms[which], slot, value)
            rooms[which].give_back(slot)
    assert all(holds(rooms[which], slot, value) for which, slot, value in taken)


def test_free_memory_serves_any_size_again():
    memory = slabs()
    small, _, large = regions(memory)
    taken = [slot for slot in iter(small.take, None)]
    assert large.take() is None
    for slot in taken:
        small.give_back(slot)
    fresh = regions(slabs())[2]
    assert len(list(iter(large.take, None))) == len(list(iter(fresh.take, None))) > 10


def test_large_slots_lie_side_by_side():
    """Four slots of a little under 3 MiB fill a buffer of 12, also after something else lay there."""
    memory = slabs(12 * MIB)
    small, large = memory.region([(300, torch.float32)]), memory.region([(29 * MIB // 40, torch.float32)])
    assert large.least_bytes == 3 * MIB
    for _ in range(2):
        taken = list(iter(large.take, None))
        assert len(taken) == 4
        for i, slot in enumerate(taken):
            fill(large, slot, i)
        assert all(holds(large, slot, i) for i, slot in enumerate(taken))
        for slot in taken:
            large.give_back(slot)
        kept = small.take()
        assert list(iter(large.take, None)) == taken[:3]  # small slots come from the end
        for slot in taken[:3]:
            large.give_back(slot)
        small.give_back(kept)


def test_a_slot_says_who_else_must_go_before_others_get_its_memory():
    small = regions(slabs())[0]
    first, second = small.take(), small.take()
    assert set(small.neighbours(first)) == {first, second}
    small.give_back(second)
    assert set(small.neighbours(first)) == {first}


def test_every_byte_of_the_buffer_is_within_its_bounds():
    buffer = torch.zeros(8 * MIB + 77, dtype=torch.uint8)
    for region in regions(Slabs(buffer)):
        for slot in iter(region.take, None):
            fill(region, slot, -1)
            region.give_back(slot)
            break
        for array in region.arrays:
            end = (array.shape[0] - 1) * array.stride(0) + array.shape[1] + array.storage_offset()
            assert end * array.element_size() <= len(buffer)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return read_backbone(tiny_backbone("bert", tmp_path_factory.mktemp("bert")))


@pytest.mark.parametrize("kinds", [("lora",), ("houlsby", "ia3"), ("diff", "lora")], ids="+".join)
def test_modules_in_slabs_answer_as_the_dense_reference(backbone, tmp_path, kinds):
    from vbert.model import Model, SequenceInput
    from vbert.reference import dense_forward

    model = Model.load(backbone, "float32", "cpu")
    arena = Arena(backbone.config, backbone.fingerprint, torch.float32, 16 * MIB, memory=slabs(16 * MIB))
    ids, types = [2, 7, 9, 3], [0, 0, 0, 0]
    sequences, expected = [], []
    for seed in range(5):
        module = Factory(backbone, seed).tenant(*kinds)
        data = write_tenant(module)
        digest = hashlib.sha256(data).hexdigest()
        (tmp_path / digest).write_bytes(data)
        resident = arena.fill(arena.reserve(parse_header(data), digest), tmp_path / digest)
        sequences.append(SequenceInput(ids, types, resident))
        answer = dense_forward(backbone, module, torch.tensor(ids), torch.tensor(types))
        expected.append(SelfTest(token_ids=torch.tensor(ids), type_ids=torch.tensor(types), expected=answer))
    check_outputs(expected, model.forward(model.pack(sequences)), torch.float32)


def test_a_class_without_room_names_who_could_make_way(backbone, tmp_path):
    def header_of(*kinds, seed=0):
        data = write_tenant(Factory(backbone, seed).tenant(*kinds))
        return parse_header(data), hashlib.sha256(data).hexdigest()

    arena = Arena(backbone.config, backbone.fingerprint, torch.float32, MIB, memory=slabs(MIB // 2))
    taken = []
    for seed in range(1_000):
        header, digest = header_of("lora", seed=seed)
        if (reservation := arena.reserve(header, digest)) is None:
            break
        taken.append(reservation)
    assert len(taken) > 3
    same, crowds = arena.rivals(header)
    assert same == {reservation.digest for reservation in taken}
    other, other_digest = header_of("houlsby")
    same, crowds = arena.rivals(other)
    assert arena.reserve(other, other_digest) is None
    assert same == set()
    for reservation in taken:
        if reservation.digest in crowds[0] | crowds[-1]:
            arena.release(reservation)
    assert arena.reserve(other, other_digest) is not None


def test_a_tenant_of_two_kinds_that_cannot_fit_is_known_before_it_waits(backbone):
    """Each of its slots would fit alone."""
    data = write_tenant(Factory(backbone, 0).tenant("lora", "ia3"))
    header = parse_header(data)
    one = Arena(backbone.config, backbone.fingerprint, torch.float32, MIB, memory=slabs(MIB // 4))
    assert not one.can_hold(header)
    two = Arena(backbone.config, backbone.fingerprint, torch.float32, MIB, memory=slabs(MIB // 2))
    assert two.can_hold(header)
    assert two.reserve(header, "digest") is not None


def test_a_first_class_leaves_room_for_a_second():
    memory = slabs(2 * MIB)
    large, other = (memory.region([(size, torch.float32)]) for size in (60_000, 60_001))
    assert large.take() is not None
    assert other.take() is not None


@pytest.mark.parametrize("kinds", [(), ("lora",)], ids=["head only", "lora"])
def test_the_head_moves_with_its_tenant(backbone, tmp_path, kinds):
    data = write_tenant(Factory(backbone, 0).tenant(*kinds))
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / digest).write_bytes(data)
    arena = Arena(backbone.config, backbone.fingerprint, torch.float32, MIB)
    tenant = arena.fill(arena.reserve(parse_header(data), digest), tmp_path / digest)
    moved = tenant.moved(tenant.reservation, torch.device("meta"))
    assert {layer.weight.device.type for layer in moved.head.layers} == {"meta"}
    assert {layer.weight.device.type for layer in tenant.head.layers} == {"cpu"}


def test_a_file_may_be_larger_than_the_memory(tmp_path):
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    size = 2 * sum(int(told[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, size)
    with path.open("rb") as file, mapped(file) as memory:
        assert len(memory) == size
        assert memory[size - 1] == 0
    os.truncate(path, 0)
    with path.open("rb") as file, pytest.raises(ValueError, match="empty"):
        mapped(file)
