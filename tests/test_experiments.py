"""The experiments of published systems, on a backbone so small that nothing is measured."""

import json
import sys
from dataclasses import replace

import pytest

from benchmarks import experiments_report, plots
from benchmarks.experiments import fastptm_instances, pets_batching
from benchmarks.report import RESULTS, markdown
from benchmarks.workload import PETS_KINDS
from runtime.cost import CostModel
from runtime.policies.pooled import ProfileCosts
from runtime.policies.pools import POOL_POLICIES, padding_of
from runtime.sampler import Repeats
from tests.tiny import tiny_backbone
from vbert.errors import ConfigError

QUICK = replace(
    pets_batching.EFFORT,
    tokens=(32, 256),
    lengths=(8, 32),
    repeats=Repeats(least=2, most=2, point_s=0.0, largest_s=1.0),
)


def test_every_way_computes_every_query_once():
    pool = pets_batching.pool_of(PETS_KINDS * 4, queries=100, std=8)
    costs = ProfileCosts(CostModel.on_a_line(1e4, 0.002), 256)
    plans = {name: policy.cut(pool, costs) for name, policy in POOL_POLICIES.items()}
    every = pets_batching.launches_of(pool, plans, 256)
    assert len(every) == 2 * len(POOL_POLICIES) + 1
    for name, launches in every.items():
        computed = sorted(query for launch in launches for query in launch)
        assert [i for i, _ in computed] == list(range(len(pool)))
        wide = [tokens - query.length for (_, tokens), query in zip(computed, pool, strict=True)]
        assert min(wide) >= 0
        assert (max(wide) == 0) == name.endswith("packed")
    padded = sum(tokens for launch in every["fixed, padded"] for _, tokens in launch)
    assert padded / sum(query.length for query in pool) == pytest.approx(padding_of(plans["fixed"], pool))
    assert all(sum(tokens for _, tokens in launch) <= 256 for launch in every["filled, packed"])


@pytest.mark.slow
def test_a_pool_is_measured_by_all_ways_and_drawn(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(pets_batching, "write_backbone", lambda shape, folder, seed: tiny_backbone("bert", folder))
    monkeypatch.setattr(pets_batching, "EFFORT", QUICK)
    flags = "--json --queries 24 --tasks 4 2 --std 2 --rounds 1 --threads 1 --max-batch-tokens 256"
    pets_batching.main([*flags.split(), "--plot", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads(capsys.readouterr().out)
    assert [row["tasks"] for row in result["rows"]] == 11 * [4] + 11 * [2]
    assert {row["to_fixed"] for row in result["rows"] if row["system"] == pets_batching.BASELINE} == {1.0}
    tables = experiments_report.tables(lambda name: [result], lambda _: "\n\n", markdown)
    (title, _, *table), cuts = (tables[name]().splitlines() for name in ("pets_batching", "pets_batching_cuts"))
    assert title == "minilm-l6, 24 queries. "
    assert len(table) == len(cuts) == 4
    assert table[0].count("|") == 2 + 1 + 10 + 1 + 1  # pool, baseline, ratios, the most; and the last line
    assert cuts[0] == "| shape | tasks | std | fixed | alpha-only | beta-only | coordinated | joint | filled |"


@pytest.mark.slow
def test_instances_answer_every_request_and_are_drawn(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fastptm_instances, "write_backbone", lambda shape, folder, seed: tiny_backbone("bert", folder))
    flags = "--json --kinds 3 --requests 6 --items 2 --tokens 8 --traces cyclic 0.01 --instances 2 --threads 1"
    fastptm_instances.main([*flags.split(), "--plot", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads(capsys.readouterr().out)
    systems = [*fastptm_instances.BASELINES, *(f"vbert, {name}" for name in fastptm_instances.POLICIES)]
    assert [row["system"] for row in result["rows"]] == 2 * systems
    loads = {(row["trace"], row["system"]): row["switches"] for row in result["rows"]}
    assert loads["cyclic", "full loading"] == 6
    assert loads["cyclic", "weight swap"] == 6  # two queues: 0, 2, 1 and 1, 0, 2
    assert max(row["overtimes"] for row in result["rows"]) == 0
    table = experiments_report.tables(lambda name: [result], lambda _: "", markdown)["fastptm_instances"]()
    assert len(table.splitlines()) == 2 + 2 * len(systems)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in plots.EXPERIMENTS if (RESULTS / f"{name}.jsonl").exists()])
def test_every_recorded_result_can_be_drawn(name, tmp_path):
    plots.main([name, str(tmp_path / "figure.svg")])
    assert "</svg>" in (tmp_path / "figure.svg").read_text()


def test_a_figure_that_cannot_be_drawn_is_refused_before_anything_is_measured(monkeypatch):
    with pytest.raises(ConfigError, match=r"'figure.txt'; end its name in .png, .svg, .pdf"):
        pets_batching.main(["--plot", "figure.txt"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"install vbert\[plots\]"):
        pets_batching.main(["--plot", "figure.png"])
