"""Operators of independent tenants on several streams: the answers of one stream, and no race, whatever is late."""

from __future__ import annotations

import pytest
import torch

from tests.encoder.test_laws import Bench
from tests.kernels import emulator
from tests.lanes.operator_twin import Twin
from tests.random_tenants import Factory
from tests.tiny import tiny_backbone
from vbert.deltas import BatchDeltas
from vbert.formats.transformers_folder import read_backbone
from vbert.side_streams import SideStreams
from vbert.stream_counts import MAX_STREAMS, stream_counts

CPU = torch.device("cpu")
ALONE = [("lora",), ("houlsby",), ("mask",), ("bitfit",), ("lora",), ("vbert",), None]
TOGETHER = [("lora_all", "ia3", "parallel"), ("ia3",), ("bitfit",), ("mask", "lora"), None]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return read_backbone(tiny_backbone("bert", tmp_path_factory.mktemp("bert")))


@pytest.fixture
def bench(backbone, tmp_path):
    if emulator.COMPILER is None:
        pytest.skip("no C++ compiler (g++ or clang++) on PATH")
    return Bench(backbone, "float32", tmp_path)


def batch_of(bench, tenants, each=2):
    """Of a few sequences for each tenant, with their blocks made in advance, as where a batch is moved to a GPU."""
    factory = Factory(bench.backbone, seed=3)
    loaded = [kinds and bench.load(factory.tenant(*kinds)) for kinds in tenants]
    batch = bench.model.pack([s for tenant in loaded for s in bench.sequences(tenant)[:each]])
    for use in batch.deltas.uses:
        use.segments.device_blocks(CPU)
    return batch


def forward(bench, batch, num_streams, monkeypatch, **how):
    """Last hidden states, the twin they were computed on, with its races and the streams that were used."""
    model, twin = bench.model, Twin(monkeypatch, **how)
    model._operator_streams, model._side_streams = num_streams, SideStreams(CPU)
    with twin:
        hidden = model.hidden(batch)
    return hidden, twin


@pytest.mark.slow
@pytest.mark.parametrize("tenants", [ALONE, TOGETHER], ids=["alone", "together"])
def test_several_streams_give_the_answer_of_one_without_a_race(bench, tenants, monkeypatch):
    batch = batch_of(bench, tenants)
    plain = bench.model.hidden(batch)
    want, twin = forward(bench, batch, 1, monkeypatch)
    assert not twin.device.races
    assert len(twin.streams_used) == 1
    torch.testing.assert_close(want, plain, atol=1e-5, rtol=0)
    for num_streams in (2, 3, MAX_STREAMS):
        got, twin = forward(bench, batch, num_streams, monkeypatch, seed=num_streams)
        assert twin.device.races == []
        assert len(twin.streams_used) == min(num_streams, 3)  # no site has more than three groups
        assert torch.equal(got, want)


def is_noticed(bench, batch, want, monkeypatch, **how):
    hidden, twin = forward(bench, batch, 4, monkeypatch, **how)
    return bool(twin.device.races) or not torch.equal(hidden, want)


def test_neither_fork_nor_join_can_be_left_out(bench, monkeypatch):
    batch = batch_of(bench, TOGETHER, each=1)
    want, twin = forward(bench, batch, 4, monkeypatch)
    assert not twin.device.races
    assert {site.split(":")[0] for site in twin.device.sites} == {"vbert/side_streams.py"}
    assert len(twin.device.sites) == 2
    assert all(is_noticed(bench, batch, want, monkeypatch, drop=site) for site in twin.device.sites)


def test_classes_of_one_tenant_must_not_run_side_by_side(bench, monkeypatch):
    """Were each class a group of its own, the scale of a tenant would race with what it is to scale."""
    batch = batch_of(bench, TOGETHER, each=1)
    want, _ = forward(bench, batch, 4, monkeypatch)
    monkeypatch.setattr(BatchDeltas, "groups", property(lambda self: tuple(range(len(self.uses)))))
    assert is_noticed(bench, batch, want, monkeypatch)


def test_a_work_that_raises_is_joined_as_well(monkeypatch):
    twin, rows, run = Twin(monkeypatch), torch.zeros(4), SideStreams(CPU)

    def fails():
        raise RuntimeError("CUDA error: out of memory")

    with twin:
        with pytest.raises(RuntimeError, match="out of memory"):
            run([fails, lambda: rows.add_(1), lambda: None])
        rows.mul_(3)
    assert not twin.device.races
    assert rows.tolist() == [3] * 4


def test_groups_are_classes_that_share_no_tenant(bench):
    def groups(*tenants):
        deltas = batch_of(bench, tenants, each=1).deltas
        assert len(deltas.groups) == len(deltas.uses)
        return deltas.num_groups

    assert groups(None) == 0
    assert groups(("lora",), ("lora",), None) == 1
    assert groups(("lora",), ("houlsby",), ("ia3",)) == 3
    assert groups(("lora",), ("houlsby",), ("ia3",), ("lora", "ia3")) == 2
    assert groups(("lora", "houlsby"), ("houlsby", "ia3"), ("ia3", "lora")) == 1


def test_numbers_of_streams_worth_a_try():
    assert [stream_counts(n) for n in (1, 2, 3, 4, 5, 8)] == [
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 4),
        (1, 2, 4, 5),
        (1, 2, 4, 8),
    ]
    assert stream_counts(32) == stream_counts(100) == (1, 2, 4, 8, 16, 32)
