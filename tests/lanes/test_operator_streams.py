"""Operators of independent tenants on several streams: the answers of one stream, and no race, whatever is late."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from runtime.lane_feed import LaneFeed
from runtime.operator_streams import StreamChoice
from tests.encoder.test_laws import Bench, assert_close
from tests.kernels import emulator
from tests.lanes.fake_device import FakeDevice, FakeEvent
from tests.lanes.operator_twin import Twin
from tests.lanes.world import LazyModel, Server
from tests.random_tenants import Factory
from vbert.deltas import BatchDeltas
from vbert.packing import Ways
from vbert.side_streams import SideStreams
from vbert.stream_counts import MAX_STREAMS

CPU = torch.device("cpu")
ALONE = [("lora",), ("houlsby",), ("mask",), ("bitfit",), ("lora",), ("vbert",), None]
TOGETHER = [("lora_all", "ia3", "parallel"), ("ia3",), ("bitfit",), ("mask", "lora"), None]


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
    for seed, num_streams in enumerate((2, 3, 3, MAX_STREAMS, MAX_STREAMS)):
        got, twin = forward(bench, batch, num_streams, monkeypatch, seed=seed)
        assert twin.device.races == []
        assert len(twin.streams_used) == min(num_streams, 3)  # no site has more than three groups
        assert torch.equal(got, want)


def backwards(works):
    """Side by side on a CPU: any order will do."""
    for work in reversed(works):
        work()


def test_the_rows_that_stay_after_exits_and_those_below_a_junction_are_dealt_as_well(backbone, tmp_path, monkeypatch):
    bench, factory = Bench(backbone, "float32", tmp_path), Factory(backbone, seed=7)
    modules = [factory.with_exits(factory.tenant(kind), 1) for kind in ("lora", "houlsby", "bitfit", "lora")]
    tenants = [bench.load(module) for module in modules]
    leaving = [
        replace(s, exit_above=0.0 if i % 2 else 1.0)
        for tenant in tenants
        for i, s in enumerate(bench.sequences(tenant))
    ]
    twice = [s for tenant in tenants for s in bench.sequences(tenant)[:1] * 2]
    ways = Ways(layer=1, first=[i - i % 2 for i in range(len(twice))], shares=[False] * len(twice))
    packed = bench.model.pack(leaving), bench.model.pack_joined(twice, ways)
    assert packed[1].junction.lower.deltas is not packed[1].deltas
    want = [bench.model.forward(batch) for batch in packed]
    seen, plain = [], BatchDeltas.side_by_side
    monkeypatch.setattr(BatchDeltas, "side_by_side", lambda *how: seen.append(how[1]) or plain(*how))
    bench.model._operator_streams, bench.model._side_streams = 4, backwards
    for batch, answers, dealt in zip(packed, want, (2, 2), strict=True):
        seen.clear()
        assert_close(bench.model.forward(batch), answers, 1e-5)
        assert seen == [4] * dealt


def is_noticed(bench, batch, want, monkeypatch, **how):
    hidden, twin = forward(bench, batch, 4, monkeypatch, **how)
    return bool(twin.device.races) or not torch.equal(hidden, want)


@pytest.mark.slow
def test_neither_fork_nor_join_can_be_left_out(bench, monkeypatch):
    batch = batch_of(bench, TOGETHER, each=1)
    want, twin = forward(bench, batch, 4, monkeypatch)
    assert not twin.device.races
    assert {site.split(":")[0] for site in twin.device.sites} == {"vbert/side_streams.py"}
    assert len(twin.device.sites) == 2
    assert all(is_noticed(bench, batch, want, monkeypatch, drop=site) for site in twin.device.sites)


@pytest.mark.slow
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


def test_batches_of_the_lanes_try_each_number_and_keep_the_fastest(modules, monkeypatch):
    asked, plain = [], LazyModel.launch

    def launch(model, batch, feed=None):
        asked.append(feed.operator_streams(4))
        return plain(model, batch, feed)

    monkeypatch.setattr(LazyModel, "launch", launch)
    monkeypatch.setattr(FakeEvent, "since_s", lambda *_: {1: 3e-3, 2: 1e-3, 4: 2e-3}[asked[-1]])
    with Server(modules, FakeDevice()) as server:
        server.run([(None,)] * 10, lengths=(5,), depth=1)
    assert asked == [1, 2, 4, *[2] * 7]


def test_a_batch_that_waited_for_modules_says_nothing_of_streams():
    choice = StreamChoice()
    feed = LaneFeed(
        SimpleNamespace(batch=SimpleNamespace(rows=SimpleNamespace(token_ids=range(9)))), [None], None, None
    )
    feed.streams = choice
    assert [feed.operator_streams(2), choice.choose(9, 2), choice.choose(9, 2)] == [1, 2, 1]
    choice.observe(1, 9, 2, 2.0)
    feed.took(1e-9)
    choice.observe(2, 9, 2, 1.0)
    assert choice.choose(9, 2) == 2
