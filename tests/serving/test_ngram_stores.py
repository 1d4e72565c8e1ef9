"""Where n-grams come from: tables, of a domain first, and a cache that learns what came again."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from runtime import core
from runtime.paths import table_files
from tests.serving.helpers import add, until
from tests.serving.skip_world import World
from tests.tiny import TEXTS
from vbert.errors import ConfigError, WrongBackbone
from vbert.ngram.index import look_up
from vbert.ngram.table import NgramTable, TableWriter

CLOSE = {"rtol": 0, "atol": 1e-3}  # rows of tables are float16


async def test_who_does_not_share_has_no_part_in_the_cache(world, on_skip):
    async with on_skip(ngram_cache_bytes=2**20, sequence_sharing=("bank=own", "shop=off")) as engine:
        module = world.tenant(1, "exact")
        for name in ("bank", "shop"):
            await add(engine, name, module)
            for _ in range(3):
                await engine.classify(name, [TEXTS[1]])
        assert engine.snapshot().ngrams["inserted"] == engine.snapshot().ngrams["trigrams"] == 0


async def test_n_grams_are_kept_when_they_come_again(world, on_skip):
    async with on_skip(ngram_cache_bytes=2**20) as engine:
        module = world.tenant(1, "exact")
        await add(engine, "t", module)
        for i in range(4):
            await until(lambda: engine.snapshot().ngrams["inserted"] > 0 or i < 2)  # noqa: B023
            answer = await engine.classify("t", [TEXTS[1]])
            np.testing.assert_allclose(answer.probabilities[0], world.expected(module, TEXTS[1], "exact"), **CLOSE)
        counted = engine.snapshot().ngrams
        total, distinct = len(world.keys([TEXTS[1]])), len(np.unique(world.keys([TEXTS[1]])))
        assert counted["trigrams"] == 2 * total  # the first computes, the second keeps
        assert counted["inserted"] == distinct
        assert engine.snapshot().paths["exact"] == 4
        assert engine.snapshot().memory_bytes["ngrams"] > 0


async def test_a_domain_is_asked_first(world, on_skip):
    keys = world.keys([TEXTS[1]])
    general, finance = world.table(keys, "general"), world.table(keys, "finance", noise=0.5)
    files = (general, f"finance={finance}")
    async with on_skip(ngrams=files, ngram_domains=("bank.*=finance",)) as engine:
        module = world.tenant(1, "exact")
        for name in ("bank.a", "shop.a"):
            await add(engine, name, module)
        bank, shop = await asyncio.gather(*(engine.classify(n, [TEXTS[1]]) for n in ("bank.a", "shop.a")))
        wanted = world.expected(module, TEXTS[1], "exact")
        np.testing.assert_allclose(shop.probabilities[0], wanted, **CLOSE)
        assert abs(bank.probabilities[0] - wanted).max() > 0.01


async def test_rows_of_layers_adapted_to_a_domain_are_never_exact(world, on_skip):
    """What may be exact gets what `compute` gives; what can only back off gets the domain's rows."""
    keys = world.keys([TEXTS[1]])
    adapted = world.table(keys, "finance", noise=0.5, encoder="sha256:adapted")
    module, only = world.tenant(1, "exact", "backoff"), world.tenant(1, "backoff")
    async with on_skip(ngrams=(f"finance={adapted}",), ngram_domains=("bank=finance", "only=finance")) as engine:
        await add(engine, "bank", module)
        await add(engine, "only", only)
        bank, backs_off = await asyncio.gather(*(engine.classify(n, [TEXTS[1]]) for n in ("bank", "only")))
        wanted = world.expected(module, TEXTS[1], "exact")
        assert bank.paths == ("exact",)
        np.testing.assert_allclose(bank.probabilities[0], wanted, **CLOSE)
        asked = engine.snapshot().ngrams
        assert (await engine.classify("bank", [TEXTS[1]], path="backoff")).paths == ("backoff",)
        assert engine.snapshot().ngrams["trigrams"] == asked["trigrams"]  # it had none of them
        assert backs_off.paths == ("backoff",)
        assert abs(backs_off.probabilities[0] - wanted).max() > 0.01
        assert engine.snapshot().ngrams["trigrams"] == len(keys)  # those of one tenant


async def test_rows_of_one_byte_a_number_are_served(world, on_skip):
    module, table = world.tenant(1, "exact"), world.table(world.keys([TEXTS[1]]), dtype=torch.int8)
    async with on_skip(ngrams=(table,)) as engine:
        await add(engine, "t", module)
        await engine.classify("t", [TEXTS[1]])  # self-tests compute their n-grams
        before = engine.snapshot().ngrams
        answer = await engine.classify("t", [TEXTS[1]])
        after = engine.snapshot().ngrams
        np.testing.assert_allclose(
            answer.probabilities[0], world.expected(module, TEXTS[1], "exact"), rtol=0, atol=0.01
        )
        assert after["computed"] == before["computed"]
        assert after["trigrams"] == before["trigrams"] + len(world.keys([TEXTS[1]]))


@pytest.mark.parametrize("free", [0, 1000, 2**40])
async def test_tables_are_read_ahead_as_far_as_half_of_the_free_memory_goes(world, on_skip, monkeypatch, free):
    tables, read = [world.table(world.keys([text]), f"t{i}") for i, text in enumerate(TEXTS[:2])], []

    def read_ahead(table, begin, count, read_part=NgramTable.read_ahead):
        read.append(read_part(table, begin, count))
        return read[-1]

    monkeypatch.setattr(NgramTable, "read_ahead", read_ahead)
    monkeypatch.setattr(core, "available_bytes", lambda: free)
    monkeypatch.setattr(core, "_READ_AT_ONCE", 300)
    async with on_skip(ngrams=tuple(tables)):
        size = sum(NgramTable(path, None).num_bytes for path in tables)
        await until(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "vbert-tables"])
        assert sum(read) == min(size, free // 2)


async def test_a_table_that_went_away_is_not_read_ahead_and_serves(world, on_skip, monkeypatch, caplog):
    def gone(table, begin, count):
        raise FileNotFoundError("gone")

    monkeypatch.setattr(NgramTable, "read_ahead", gone)
    module = world.tenant(1, "exact")
    async with on_skip(ngrams=(world.table(world.keys([TEXTS[0]])),)) as engine:
        await until(lambda: "is not read ahead: gone" in caplog.text)
        await add(engine, "t", module)
        answer = await engine.classify("t", [TEXTS[0]])
        np.testing.assert_allclose(answer.probabilities[0], world.expected(module, TEXTS[0], "exact"), **CLOSE)


async def test_with_a_sequence_store_a_text_that_came_before_takes_neither_path(world, on_skip):
    if "plain" not in world.paths:
        with pytest.raises(ConfigError, match="this backbone has none"):
            async with on_skip(sequence_store_bytes=2**20):
                pass
        return
    module, table = world.tenant(1, "plain", "exact"), world.table(world.keys([TEXTS[0]]))
    async with on_skip(sequence_store_bytes=2**20, ngrams=(table,)) as engine:
        await add(engine, "t", module)
        assert (await engine.classify("t", [TEXTS[5], TEXTS[0]])).paths == ("plain", "exact")
        await until(lambda: engine.snapshot().sequences["inserted"] == 1)
        for _ in range(2):
            assert (await engine.classify("t", [TEXTS[5], TEXTS[0]])).paths == ("stored", "exact")
        answer = await engine.classify("t", [TEXTS[5], TEXTS[5], TEXTS[0]])
        for text, got, path in zip(
            (TEXTS[5], TEXTS[5], TEXTS[0]), answer.probabilities, ("plain", "plain", "exact"), strict=True
        ):
            np.testing.assert_allclose(got, world.expected(module, text, path), **CLOSE)


async def test_what_does_not_belong_together_is_refused_at_the_start(world, on_skip, serving, tmp_path):
    other = World(world.backbone, tmp_path)
    keys = other.keys([TEXTS[0]])
    with TableWriter(
        tmp_path / "x",
        fingerprint="sha256:other",
        keys=np.unique(keys),
        counts=np.ones(len(np.unique(keys)), np.int64),
        width=world.backbone.config.hidden_size,
    ) as writer:
        writer.add(world.model.local.encode(np.unique(keys)))
    with pytest.raises(WrongBackbone, match="was made by backbone"):
        async with on_skip(ngrams=(str(tmp_path / "x"),)):
            pass
    with pytest.raises(ConfigError, match="has no local layers"):
        async with serving(ngram_cache_bytes=2**20):
            pass
    with pytest.raises(ConfigError, match="ngram_domains"):
        async with on_skip(ngram_domains=("a=b",)):
            pass
    with pytest.raises(ConfigError, match="no tenant is of that domain"):
        async with on_skip(ngrams=("finance=x",), ngram_domains=()):
            pass
    assert table_files(("/a=b/c", "d=/e=f")) == {"": ["/a=b/c"], "d": ["/e=f"]}
    with pytest.raises(ConfigError, match="write FILE, or DOMAIN=FILE"):
        async with on_skip(ngrams=("=f",)):
            pass


def test_a_look_up_finds_what_was_written(world):
    keys = np.unique(world.keys(TEXTS))
    table = NgramTable(world.table(keys), world.backbone.skip.base)
    rows, kept = look_up(keys, table._index)
    assert (kept == 3).all()
    out = torch.empty(len(keys), 3, table.width)
    table.gather(rows, out)
    torch.testing.assert_close(out, world.model.local.encode(keys), atol=2e-3, rtol=2e-3)


async def test_a_profile_knows_what_n_grams_cost(world, on_skip, tmp_path):
    """Where it says that computing is dear, a text with a missing n-gram goes the plain way."""
    from runtime.cost import CostModel, Curve, Point
    from runtime.open_stores import _costs

    async with on_skip(profile=str(tmp_path / "profiles")) as engine:
        cost = engine._core.parts.cost
        assert cost.conditions.local_layers == world.backbone.skip.config.local_layers
        assert cost.local_s(512) >= cost.local_s(4) > 0
        await add(engine, "t", world.tenant(0))
    if "plain" not in world.paths:
        return
    for seconds, pays in ((1e-9, True), (10.0, False)):
        curve = Curve([Point(size=1, seconds=seconds, spread=0, repeats=1, threads=1)])
        costs = _costs(world.backbone.skip.config, 3, CostModel(cost.conditions, {**cost.curves, "local": curve}))
        assert costs.exact_pays(20, 1) == pays
        assert costs.exact_pays(20, 0)
        most = 20 * 0.8 * world.backbone.skip.config.first_layer / (3 * world.backbone.skip.config.local_layers)
        assert not costs.exact_pays(20, int(most) + 1)  # as many rows as are saved, whatever the profile says
