"""Tenants with weights of their own: equal to the dense reference, alone in their batch, views of their slot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.encoder.test_laws import Bench, assert_close
from tests.random_tenants import Factory
from tests.tiny import tiny_backbone
from vbert.checkpoint import read_tenant_bytes, write_tenant
from vbert.config import MODEL_TYPES
from vbert.encoder import Encoder
from vbert.errors import CorruptFile, ShapeError
from vbert.formats import read_backbone
from vbert.header import parse_header
from vbert.packing import by_weights


@pytest.fixture(params=MODEL_TYPES)
def bench(request, tmp_path):
    return Bench(read_backbone(tiny_backbone(request.param, tmp_path / "backbone")), "float32", tmp_path)


@pytest.mark.parametrize("head", ["classify", "token_classify", "embed"])
def test_it_equals_the_dense_reference(bench, head):
    module = Factory(bench.backbone, seed=3).tenant("whole", head=head)
    got = bench.forward(bench.sequences(bench.load(module)))
    assert_close(got, bench.expected(module), 1e-4)
    bare = bench.forward(bench.sequences(None))
    assert_close(bare, bench.expected(None), 1e-4)


def test_a_slot_is_used_where_it_lies(bench):
    tenant = bench.load(Factory(bench.backbone, seed=3).tenant("whole"))
    ((arena_class, slot),) = tenant.slots
    begin = arena_class.values[slot].data_ptr()
    inside = range(begin, begin + arena_class.slot_bytes)
    encoder = Encoder.of_tenant(bench.backbone.config, tenant)
    assert all(layer.qkv.weight.data_ptr() in inside for layer in encoder._layers)
    assert encoder._word.data_ptr() in inside
    assert encoder.num_bytes <= arena_class.slot_bytes


def test_the_native_file_brings_every_number_back(bench):
    module = Factory(bench.backbone, seed=3).tenant("whole")
    data = write_tenant(module)
    again = read_tenant_bytes(data)
    assert parse_header(data).is_whole
    assert parse_header(data).lowest_layer == -1
    deltas = {(delta.layer, delta.site): delta for delta in again.deltas}
    assert len(deltas) == len(module.deltas)
    for delta in module.deltas:
        assert torch.equal(deltas[delta.layer, delta.site].weight, delta.weight)
    parse_header(data).check(bench.backbone.config, bench.backbone.fingerprint)


def test_it_shares_no_batch_with_anybody(bench):
    factory = Factory(bench.backbone, seed=3)
    own, other, lora = (bench.load(factory.tenant(kind)) for kind in ("whole", "whole", "lora"))
    for mates in ((own, lora), (own, other), (own, None)):
        sequences = [s for tenant in mates for s in bench.sequences(tenant)[:2]]
        with pytest.raises(ShapeError, match="shares no batch"):
            bench.model.pack(sequences)
    mixed = [bench.sequences(tenant)[0] for tenant in (own, lora, other, None, own)]
    groups = by_weights(mixed)
    assert groups[0] == [1, 3]
    assert sorted(groups[1:]) == [[0, 4], [2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda deltas: deltas[1:], "weights at layer -1, .*: shapes None"),
        (lambda deltas: [*deltas[:-1], replace(deltas[-1], bias=None)], "weights at layer 1, ffn_norm"),
        (lambda deltas: [*deltas, replace(deltas[-1], layer=9)], "layer 9, .*the backbone's are None"),
    ],
)
def test_weights_that_are_not_whole_are_refused(bench, change, message):
    module = Factory(bench.backbone, seed=3).tenant("whole")
    data = write_tenant(replace(module, deltas=tuple(change(list(module.deltas)))))
    with pytest.raises(CorruptFile, match=message):
        parse_header(data).check(bench.backbone.config, bench.backbone.fingerprint)


def test_other_deltas_beside_whole_weights_are_refused(bench):
    data = write_tenant(Factory(bench.backbone, seed=3).tenant("whole", "lora"))
    with pytest.raises(CorruptFile, match="whole weights beside deltas of kind low_rank, weights"):
        parse_header(data).check(bench.backbone.config, bench.backbone.fingerprint)
