"""The arena: slots are taken, given back and reused exactly, and the byte account is what is held."""

import hashlib

import pytest
import torch

from tests.random_tenants import Factory
from tests.tiny import tiny_backbone
from vbert.arena import Arena
from vbert.checkpoint import write_tenant
from vbert.errors import ShapeError, WrongBackbone
from vbert.formats.transformers_folder import read_backbone
from vbert.header import parse_header


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return read_backbone(tiny_backbone("bert", tmp_path_factory.mktemp("bert")))


@pytest.fixture
def make(backbone, tmp_path):
    """kinds, seed -> (header, digest, path) of a tenant written to disk."""

    def write(*kinds, seed=0):
        data = write_tenant(Factory(backbone, seed).tenant(*kinds))
        digest = hashlib.sha256(data).hexdigest()
        (tmp_path / digest).write_bytes(data)
        return parse_header(data), digest, tmp_path / digest

    return write


def arena_of(backbone, max_bytes=2**20, dtype=torch.float32):
    return Arena(backbone.config, backbone.fingerprint, dtype, max_bytes)


def test_tenants_of_one_layout_share_a_class_and_others_do_not(backbone, make):
    arena = arena_of(backbone)
    first, second, other = (
        arena.reserve(*make(kind, seed=s)[:2]) for kind, s in (("lora", 0), ("lora", 1), ("ia3", 0))
    )
    assert first.slots[0][0] is second.slots[0][0]
    assert first.slots[0][1] != second.slots[0][1]
    assert other.slots[0][0] is not first.slots[0][0]


def test_sparse_tenants_with_different_counts_share_a_class(backbone, make):
    """Never two masks have the same number of non-zeros; a class each would be a launch each."""
    arena = arena_of(backbone)
    slots = [arena.reserve(*make("mask", seed=s)[:2]).slots[0] for s in range(6)]
    assert len({id(arena_class) for arena_class, _ in slots}) <= 2
    for arena_class, _ in slots:
        assert arena_class.width <= 1.25 * max(arena_class.layout.numel, 64)


def test_the_account_is_the_sum_of_the_kinds(backbone, make):
    arena = arena_of(backbone)
    header, digest, _ = make("lora", "houlsby", "diff")
    reservation = arena.reserve(header, digest)
    assert set(reservation.bytes_by_kind) == {"low_rank", "bottleneck", "affine", "sparse", "head"}
    assert reservation.num_bytes == arena.num_bytes(header) == sum(reservation.bytes_by_kind.values())
    assert reservation.bytes_by_kind["low_rank"] == header.layouts["low_rank"].numel * 4
    halved = arena_of(backbone, dtype=torch.bfloat16)
    assert halved.reserve(header, digest).bytes_by_kind["low_rank"] * 2 == reservation.bytes_by_kind["low_rank"]


def test_a_full_class_takes_nothing_and_leaks_nothing(backbone, make):
    header, digest, _ = make("lora", "ia3")
    arena = arena_of(backbone, max_bytes=2 * header.layouts["low_rank"].numel * 4)  # two slots of low rank
    taken = [arena.reserve(header, f"{digest}{i}") for i in range(3)]
    assert taken[2] is None
    affine = next(c for c, _ in taken[0].slots if c.kind == "affine")
    assert len(affine.owners) == 2  # the third's affine slot was given back
    arena.release(taken[0])
    assert arena.reserve(header, digest).slots == taken[0].slots


def test_releasing_twice_is_refused(backbone, make):
    arena = arena_of(backbone)
    header, digest, _ = make("lora")
    reservation = arena.reserve(header, digest)
    arena.release(reservation)
    with pytest.raises(ShapeError, match="not owned"):
        arena.release(reservation)


def test_pages_of_a_free_slot_stay_until_another_class_needs_the_memory(backbone, make):
    header, digest, path = make("lora")
    other, other_digest, _ = make("houlsby")
    room = max(arena_of(backbone).num_bytes(h) for h in (header, other))  # for one of the two
    arena = arena_of(backbone, max_bytes=room)
    tenant = arena.fill(arena.reserve(header, digest), path)
    arena_class, slot = tenant.slots[0]
    big = arena_class._region._allocate(8, 2**20, torch.float32)  # 4 MiB a row, in the same arena class
    big[slot] = 1.0
    arena.release(tenant)
    again = arena.reserve(header, digest)
    assert again.slots == tenant.slots
    assert float(big[slot].sum()) == 2**20  # no page was given back and fetched again
    arena.release(again)
    arena.reserve(other, other_digest)
    assert float(big[slot].sum()) == 0.0  # the system gives zero pages where memory was returned


def test_another_backbone_takes_no_slot(backbone, make, tmp_path_factory):
    other = read_backbone(tiny_backbone("bert", tmp_path_factory.mktemp("other"), seed=7))
    arena = arena_of(other)
    header, digest, _ = make("lora")
    with pytest.raises(WrongBackbone):
        arena.reserve(header, digest)
    assert arena._classes == {}
