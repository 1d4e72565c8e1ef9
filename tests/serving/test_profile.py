"""The cost model is measured, kept, found again, and used before anything has run."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from runtime import own_profile
from runtime.clock import MonotonicClock
from runtime.profiler import QUICK, Profiler
from runtime.sampler import Repeats
from vbert.errors import ConfigError
from vbert.model import Model

FEW = Repeats(least=2, most=9, point_s=0.0, largest_s=0.2, passes=2)
TINY = replace(QUICK, tokens=(8, 64), lengths=(4, 32, 512), ranks=(1, 4), rows=(4, 8), modules=(1, 2), repeats=FEW)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(own_profile, "QUICK", TINY)


@pytest.fixture
def profiler(backbone, tmp_path):
    def profiler(**options):
        given = {"backbone": backbone, "model": Model.load(backbone, "float32"), "folder": tmp_path, "effort": TINY}
        return Profiler(**given | {"thread_counts": (1,), "clock": MonotonicClock()} | options)

    return profiler


def test_every_curve_is_measured(profiler, tmp_path):
    told = []
    cost = profiler(progress=lambda *step: told.append(step)).run()
    sizes = {name: [point.size for point in curve.points] for name, curve in cost.curves.items()}
    loads = sizes["load/warm"]
    assert sizes == {
        "forward/4": [8, 64],
        "forward/32": [32, 64],  # one sequence is the least; 512 is longer than this backbone takes
        "load/warm": loads,
        "load/cold": loads,
        "gather_rows/32": [4, 8],
        "self_test": [1, 2],
    }
    assert loads == [r * 2 * 2 * (32 + 32) * 4 for r in TINY.ranks]  # rank, layers, sites, A and B, float32
    assert all(p.repeats == 4 for curve in cost.curves.values() for p in curve.points)
    assert (told[0][1], told[-1][1]) == (0, told[-1][2])
    assert [name for name, _, _ in told[:-1]] == [f"profile: {name}" for name in sizes] * 2
    assert list(tmp_path.iterdir()) == []
    assert 0 < cost.forward_s(64, 16) < 60


def test_modules_of_every_kind_are_measured(profiler):
    kinds = (("low_rank", 2), ("low_rank", 4), ("bottleneck", 2), ("affine", 0), ("sparse", 20))
    cost = profiler(effort=replace(TINY, kinds=kinds, tenants=(1, 3))).run()
    assert cost.module_kinds == ("low_rank", "bottleneck", "affine", "sparse")
    for kind, size in kinds:
        assert [point.size for point in cost.curves[f"with/{kind}/{size}/1"].points] == [32, 64]
        assert [point.size for point in cost.curves[f"with/{kind}/{size}/3"].points] == [96]
        assert 0 <= cost.module_s(kind, 64, tenants=2, size=size) < 60


def test_whole_weights_are_measured(profiler, backbone):
    cost = profiler(effort=replace(TINY, weights=True)).run()
    assert cost.weights_bytes >= sum(tensor.nbytes for tensor in backbone.weights.values()) * 0.9
    assert cost.curves["load/warm"].points[-1].size == cost.weights_bytes
    assert 0 < cost.swap_s() < cost.swap_s("warm") < 60


def test_what_takes_too_long_is_left_out(profiler):
    effort = replace(TINY, tokens=(8, 16, 2048, 4096), repeats=replace(FEW, largest_s=0.0), lengths=(4,))
    curve = profiler(effort=effort).run().curves["forward/4"]
    assert [point.size for point in curve.points] == [8, 16]


def test_the_fastest_thread_count_is_kept(profiler):
    cost = profiler(thread_counts=(2, 1)).run()
    assert cost.conditions.threads == 2
    assert {p.threads for name, curve in cost.curves.items() for p in curve.points if "load" in name} == {1}
    assert {p.threads for p in cost.curves["forward/4"].points} <= {1, 2}


async def test_an_engine_measures_once_and_finds_it_again(serving, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "profiles"
    async with serving(profile=str(folder)) as engine:
        assert engine.snapshot().tokens_per_s > 0
    (path,) = folder.iterdir()
    assert "measuring a short one" in caplog.text
    assert str(path) in caplog.text
    before = path.read_bytes()
    caplog.clear()
    async with serving(profile=str(folder)):
        pass
    assert "measur" not in caplog.text
    assert path.read_bytes() == before
    async with serving(profile=str(path)) as engine:
        core = engine._core
        cost = core.parts.cost
        assert core.manager.load_cost(10**6) == cost.load_s(10**6)
        assert core.pipeline.tokens_per_s(64) > 0


async def test_a_profile_of_another_machine_is_refused(serving, tmp_path):
    async with serving(profile=str(tmp_path)):
        pass
    (path,) = tmp_path.glob("*.json")
    value = json.loads(path.read_text())
    value["conditions"] |= {"device": "a Pentium", "threads": 64}
    path.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=r"device 'a Pentium' \(here .*threads 64 \(here 1\); run `vbert profile`"):
        async with serving(profile=str(path)):
            pass


async def test_a_folder_that_cannot_be_written_is_logged(serving, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    async with serving(profile=str(tmp_path / "file")) as engine:
        assert engine._core.parts.cost is not None
    assert "measured again at the next start" in caplog.text


async def test_without_a_profile_nothing_is_measured(serving):
    async with serving() as engine:
        assert engine._core.parts.cost is None
