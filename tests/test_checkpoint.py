"""The native file: what is written is read back, and whatever is wrong with a file is said before it is used."""

import hashlib
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save

from runtime.module_files import ModuleFiles
from tests.random_tenants import DELTA_KINDS, HEADS, Factory
from tests.tiny import tiny_backbone
from vbert import slot_file
from vbert.arena import Arena
from vbert.checkpoint import read_tenant_bytes, write_tenant
from vbert.errors import CorruptFile, ShapeError, WrongBackbone
from vbert.formats.transformers_folder import read_backbone
from vbert.header import parse_header, read_header
from vbert.layout import kind_of
from vbert.tenant import SelfTest


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return read_backbone(tiny_backbone("bert", tmp_path_factory.mktemp("bert")))


@pytest.fixture
def module(backbone):
    return Factory(backbone, seed=1).tenant("lora", "houlsby", "diff")


def rewrite(data, change_meta=None, change_tensors=None):
    """The same file with its metadata or tensors changed, still valid safetensors."""
    size = int.from_bytes(data[:8], "little")
    meta = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["vbert"])
    tensors = load(data)
    if change_meta:
        change_meta(meta)
    if change_tensors:
        change_tensors(tensors)
    return save(tensors, metadata={"vbert": json.dumps(meta)})


def as_dict(delta):
    return {name: getattr(delta, name) for name in delta.__slots__}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", DELTA_KINDS)
def test_round_trip(backbone, kind, head):
    module = Factory(backbone, seed=2).tenant(kind, head=head)
    data = write_tenant(module)
    again = read_tenant_bytes(data)
    assert write_tenant(again) == data
    assert (again.head.kind, again.head.labels, again.head.problem) == (
        module.head.kind,
        module.head.labels,
        module.head.problem,
    )

    def ordered(deltas):
        return sorted(deltas, key=lambda d: (kind_of(d), d.layer, d.site))

    for a, b in zip(ordered(again.deltas), ordered(module.deltas), strict=True):
        for name, value in as_dict(b).items():
            other = as_dict(a)[name]
            assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value


def test_header_says_what_is_inside(backbone, module, tmp_path):
    path = tmp_path / "t"
    path.write_bytes(write_tenant(module))
    header = read_header(path)
    header.check(backbone.config, backbone.fingerprint)
    assert set(header.kinds) == {"low_rank", "bottleneck", "affine", "sparse"}
    assert header.lowest_layer == -1  # Diff pruning tunes the LayerNorm of the embeddings
    assert header.num_bytes == path.stat().st_size


def test_another_backbone_is_refused(backbone, module):
    header = parse_header(write_tenant(module))
    with pytest.raises(WrongBackbone, match="convert or train it again"):
        header.check(backbone.config, "sha256:" + "0" * 64)


@pytest.mark.parametrize("keep", [0, 7, 20, 1000, -1])
def test_truncated_files_are_refused(module, keep):
    data = write_tenant(module)
    with pytest.raises(CorruptFile):
        read_tenant_bytes(data[:keep])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(version=99), "version 99"),
        (lambda m: m.pop("head"), "malformed"),
        (lambda m: m["head"].update(kind="oracle"), "oracle"),
        (lambda m: m["head"].update(labels=["a"]), "1 labels"),
        (lambda m: m["head"].update(labels=[1, 2, 3]), "strings"),
        (lambda m: m["head"].update(pooling="none"), "cannot have pooling"),
        (lambda m: m["layouts"].update(magic=[]), "magic"),
        (lambda m: m["layouts"]["low_rank"].pop(), "promises"),
        (lambda m: m["layouts"]["low_rank"][0].__setitem__(4, [-3, 2]), "size"),
        (lambda m: m["layouts"].update(low_rank="no"), "malformed"),
        (lambda m: m.update(num_self_tests=2), "self_test.0"),
    ],
)
def test_lying_metadata_is_refused(module, change, says):
    with pytest.raises(CorruptFile, match=says):
        read_tenant_bytes(rewrite(write_tenant(module), change_meta=change))


def test_exits_are_written_and_read(backbone, module):
    exits = Factory(backbone, seed=2).with_exits(module, 1, threshold=0.7)
    test = SelfTest(token_ids=torch.tensor([1]), type_ids=torch.tensor([0]), expected=torch.ones(3), exit=1)
    data = write_tenant(replace(exits, self_tests=(test,)))
    again, header = read_tenant_bytes(data), parse_header(data)
    header.check(backbone.config, backbone.fingerprint)
    assert (again.exit_threshold, again.self_tests[0].exit) == (0.7, 1)
    assert torch.equal(again.exits[0].head.layers[0].weight, exits.exits[0].head.layers[0].weight)
    assert (again.exits[0].layer, again.exits[0].head.labels) == (1, module.head.labels)
    high = replace(backbone.config, num_layers=1)
    with pytest.raises(CorruptFile, match="an exit stands before layer 1; there are 1"):
        replace(header, layouts={}).check(high, backbone.fingerprint)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["exits"][0].update(layer=0), "ascending ones from 1 on"),
        (lambda m: m["exits"].append(m["exits"][0]), "ascending ones from 1 on"),
        (lambda m: m["exits"][0].update(layer=2), "malformed"),
        (lambda m: m["exits"][0].update(activations=["magic"]), "magic"),
        (lambda m: m["exits"][0].update(activations=[]), "does not explain"),
        (lambda m: m["head"].update(problem="regression"), "no confidence"),
        (lambda m: m.update(exit_threshold=1.5), "from 0 to 1"),
        (lambda m: m.update(exit_threshold=True), "from 0 to 1"),
        (lambda m: m.update(self_test_exits=[1]), "one for each"),
        (lambda m: m.pop("exits"), "does not explain"),
    ],
)
def test_lying_exits_are_refused(backbone, module, change, says):
    data = write_tenant(Factory(backbone, seed=2).with_exits(module, 1))
    with pytest.raises(CorruptFile, match=says):
        read_tenant_bytes(rewrite(data, change_meta=change))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(module, value):
    data = rewrite(write_tenant(module), change_tensors=lambda t: t["delta.low_rank"].__setitem__(5, value))
    with pytest.raises(CorruptFile, match=r"delta\.low_rank.*NaN or infinity"):
        read_tenant_bytes(data)


def test_not_safetensors_and_foreign_safetensors_are_refused():
    with pytest.raises(CorruptFile):
        read_tenant_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(CorruptFile, match="not a native tenant file"):
        read_tenant_bytes(save({"x": torch.zeros(2)}))


def test_unexplained_tensors_are_refused(module):
    data = rewrite(write_tenant(module), change_tensors=lambda t: t.update(extra=torch.zeros(1)))
    with pytest.raises(CorruptFile, match="extra"):
        read_tenant_bytes(data)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("delta.sparse.columns", 10_000, "column"), ("delta.sparse.row_starts", 10_000, "row starts")],
)
def test_sparse_indices_outside_the_matrix_are_refused_at_load(backbone, module, tmp_path, name, value, says):
    """Kernels do not check bounds, so the arena must."""
    data = rewrite(write_tenant(module), change_tensors=lambda t: t[name].__setitem__(3, value))
    path = tmp_path / "t"
    path.write_bytes(data)
    arena = Arena(backbone.config, backbone.fingerprint, torch.float32, 2**20)
    reservation = arena.reserve(parse_header(data), hashlib.sha256(data).hexdigest())
    with pytest.raises(CorruptFile, match=says):
        arena.fill(reservation, path)


def test_a_sparse_tenant_that_was_refused_is_checked_the_next_time_as_well(backbone, module, tmp_path):
    data = rewrite(write_tenant(module), change_tensors=lambda t: t["delta.sparse.columns"].__setitem__(3, 10_000))
    (tmp_path / "t").write_bytes(data)
    files = ModuleFiles(lambda _: tmp_path / "t", now_ns=lambda: 2**62)
    arena = Arena(backbone.config, backbone.fingerprint, torch.float32, 2**20)
    for _ in range(2):
        reservation = arena.reserve(parse_header(data), hashlib.sha256(data).hexdigest())
        with pytest.raises(CorruptFile, match="column"):
            arena.fill(reservation, tmp_path / "t", files)
        arena.release(reservation)


def test_an_altered_file_is_refused_at_load(backbone, module, tmp_path):
    data = write_tenant(module)
    path = tmp_path / "t"
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    arena = Arena(backbone.config, backbone.fingerprint, torch.float32, 2**20)
    reservation = arena.reserve(parse_header(data), "0" * 64)
    with pytest.raises(CorruptFile, match="altered or cut"):
        arena.fill(reservation, path)


def test_a_file_that_nobody_wrote_to_is_hashed_once(backbone, module, tmp_path, monkeypatch):
    data = write_tenant(module)
    digest, path = hashlib.sha256(data).hexdigest(), tmp_path / "t"
    path.write_bytes(data)
    arena = Arena(backbone.config, backbone.fingerprint, torch.float32, 2**20)
    late_s = [0]
    files = ModuleFiles(lambda _: path, now_ns=lambda: path.stat().st_ctime_ns + late_s[0] * 10**9)
    hashed = []
    monkeypatch.setattr(slot_file, "hashlib", SimpleNamespace(sha256=lambda start: _Counted(hashed, start)))

    def load() -> int:
        hashed.clear()
        arena.release(arena.fill(arena.reserve(parse_header(data), digest), path, files))
        return sum(hashed)

    assert files.header(digest) is None
    assert load() == load() == len(data)  # just written: it may be written again at the same time by the clock
    late_s[0] = 1
    assert load() == len(data)
    header_bytes = files.header(digest).data_begin
    assert load() == header_bytes < len(data)
    os.utime(path)  # somebody touched it
    assert load() == len(data)
    assert load() == header_bytes
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptFile, match="altered or cut"):
        load()


def test_a_file_that_is_cut_is_refused_whoever_vouches_for_it(backbone, module, tmp_path):
    """Or the numbers of the module that had the slots before would be taken for its own."""

    class Gullible:
        def unchanged(self, digest, found):
            return True

        def verified(self, digest, header, found):
            pass

    data = write_tenant(module)
    (tmp_path / "t").write_bytes(data[:-1])
    arena = Arena(backbone.config, backbone.fingerprint, torch.float32, 2**20)
    reservation = arena.reserve(parse_header(data), hashlib.sha256(data).hexdigest())
    with pytest.raises(CorruptFile, match="altered or cut"):
        arena.fill(reservation, tmp_path / "t", Gullible())


class _Counted:
    """SHA-256 that notes how many bytes it saw."""

    def __init__(self, seen: list[int], start: bytes) -> None:
        self._seen, self._hash = seen, hashlib.sha256(start)
        seen.append(len(start))

    def update(self, more: memoryview) -> None:
        self._seen.append(len(more))
        self._hash.update(more)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def test_two_deltas_at_one_place_are_refused(backbone):
    """Packing would keep the last one and lose the other."""
    with pytest.raises(ShapeError, match="merge them first"):
        write_tenant(Factory(backbone, seed=1).tenant("lora", "lora_all"))


def test_self_tests_travel_with_the_file(backbone):
    module = Factory(backbone, seed=2).tenant("lora")
    test = SelfTest(token_ids=torch.tensor([2, 5, 3]), type_ids=torch.tensor([0, 0, 0]), expected=torch.randn(3))
    module = type(module)(
        backbone_fingerprint=module.backbone_fingerprint, deltas=module.deltas, head=module.head, self_tests=(test,)
    )
    (again,) = read_tenant_bytes(write_tenant(module)).self_tests
    assert torch.equal(again.expected, test.expected)
    assert torch.equal(again.token_ids, test.token_ids)


@pytest.mark.parametrize(
    "changed",
    [{"type_ids": torch.tensor([0, 0])}, {"token_ids": torch.tensor([[2, 5, 3]])}, {"token_ids": torch.tensor([2])}],
)
def test_a_self_test_has_as_many_types_as_tokens(backbone, changed):
    test = {"token_ids": torch.tensor([2, 5, 3]), "type_ids": torch.tensor([0, 0, 0]), "expected": torch.randn(3)}
    data = write_tenant(replace(Factory(backbone, seed=2).tenant("lora"), self_tests=(SelfTest(**test),)))
    bad = rewrite(
        data, change_tensors=lambda tensors: tensors.update({f"self_test.0.{n}": t for n, t in changed.items()})
    )
    with pytest.raises(CorruptFile, match="self-test 0 has token ids"):
        read_tenant_bytes(bad)
