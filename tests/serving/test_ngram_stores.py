"""Where n-grams come from: tables, of a domain first, and a cache that learns what came again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from runtime import core
from runtime.ngram_learner import NgramLearner
from runtime.ngram_store import NgramStore, PathCosts
from runtime.paths import table_files
from runtime.streams import CpuDevice
from tests.serving.helpers import add, until
from tests.serving.skip_world import World
from tests.tiny import TEXTS
from vbert.errors import ConfigError, WrongBackbone
from vbert.ngram.index import look_up, shortened
from vbert.ngram.table import NgramTable, TableWriter
from vbert.packing import SequenceInput

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


async def test_what_backoff_did_without_is_learnt_after_the_answers(world, on_skip):
    """Seen twice, computed when nothing else is; then the text has all its n-grams, and the cheapest path is exact."""
    module, text = world.tenant(1, "exact", "backoff"), TEXTS[1]
    table = world.table(shortened(world.keys(TEXTS), 1))  # single tokens only
    async with on_skip(ngrams=(table,), ngram_cache_bytes=2**20, max_backoff=1.0) as engine:
        await add(engine, "t", module)
        distinct = len(np.unique(world.keys([text])))
        before = []
        for _ in range(2):
            answer = await engine.classify("t", [text])
            assert answer.paths == ("backoff",)
            before.append(engine.snapshot().ngrams["computed"])  # by self-tests
        assert before[0] == before[1]
        await until(lambda: engine.snapshot().ngrams["inserted"] == distinct)
        answer = await engine.classify("t", [text])
        assert answer.paths == ("exact",)
        np.testing.assert_allclose(answer.probabilities[0], world.expected(module, text, "exact"), **CLOSE)
        assert engine.snapshot().ngrams["computed"] == before[1] + distinct


async def test_what_plain_was_chosen_for_is_learnt_too(world, on_skip, monkeypatch):
    """Else a tenant of both paths would compute all layers of a text for ever, however often it comes."""
    if "plain" not in world.paths:
        return
    monkeypatch.setattr(PathCosts, "exact_pays", lambda self, tokens, missing: not missing)
    module, text = world.tenant(1, "plain", "exact"), TEXTS[1]
    async with on_skip(ngram_cache_bytes=2**20, sequence_sharing=("bank=own",)) as engine:
        for name in ("t", "bank"):
            await add(engine, name, module)
        for _ in range(2):
            assert (await engine.classify("t", [text])).paths == ("plain",)
            assert (await engine.classify("bank", [TEXTS[2]])).paths == ("plain",)  # nobody learns of it
        distinct = len(np.unique(world.keys([text])))
        await until(lambda: engine.snapshot().ngrams["inserted"] == distinct)
        answer = await engine.classify("t", [text])
        assert answer.paths == ("exact",)
        np.testing.assert_allclose(answer.probabilities[0], world.expected(module, text, "exact"), **CLOSE)
        assert (await engine.classify("bank", [text])).paths == ("plain",)
        assert engine.snapshot().ngrams["inserted"] == distinct


async def test_texts_that_never_end_are_learnt_from_as_well(world, on_skip, monkeypatch):
    """A server with something to do at any time would otherwise go on without what it was missing."""
    monkeypatch.setattr("runtime.core.Core._idle", lambda self: False)
    monkeypatch.setattr(PathCosts, "exact_pays", lambda self, tokens, missing: not missing)
    paths = ("plain", "exact") if "plain" in world.paths else ("exact", "backoff")
    module, table = world.tenant(1, *paths), world.table(shortened(world.keys(TEXTS), 1))
    async with on_skip(ngrams=(table,), ngram_cache_bytes=2**20, max_backoff=1.0) as engine:
        await add(engine, "t", module)
        async with asyncio.timeout(30):
            while (await engine.classify("t", [TEXTS[1]])).paths != ("exact",):
                pass


async def test_learning_takes_a_hundredth_of_the_time_of_a_busy_server(world, monkeypatch):
    class Now:
        seconds = 0.0

        def now_s(self):
            return self.seconds

    class Dear:
        def encode(self, keys):
            now.seconds += 0.02
            computed.append(now.seconds)
            return torch.zeros(len(keys), 3, world.backbone.config.hidden_size)

    def idle():
        if len(computed) == 100 and not visits:
            visits.append("short")
            return False
        return len(computed) >= 30

    async def sleep(seconds, really=asyncio.sleep):
        now.seconds += seconds
        await really(0)
        if now.seconds > 100:
            raise asyncio.CancelledError

    now, store, keys, computed = Now(), a_store(world), np.arange(1, 4001, dtype=np.uint64) << 21, []
    visits = []
    for _ in range(2):
        store.note([keys])
    mine = SimpleNamespace(sleep=sleep, get_running_loop=asyncio.get_running_loop)  # nobody else's sleep
    monkeypatch.setattr("runtime.ngram_learner.asyncio", mine)
    learner = NgramLearner(
        ngrams=store,
        local=Dear(),
        device=CpuDevice(now),
        compute=None,
        idle=idle,
        clock=now,
    )
    with pytest.raises(asyncio.CancelledError):
        await learner.run()
    assert computed[29] == pytest.approx(30 * 0.02 / 0.01, rel=0.05)
    assert not store.may_want  # idle at last
    pauses = np.diff(computed[30:]) - 0.02
    assert pauses[69] == pytest.approx(2 * 0.05)  # after a hundred somebody comes: idle is what looks so twice
    assert np.delete(pauses, 69) == pytest.approx(0, abs=1e-9)


async def test_what_is_stored_whole_teaches_no_n_grams(world, on_skip, monkeypatch):
    if "plain" not in world.paths:
        return
    monkeypatch.setattr("runtime.ngram_learner._LOOK_S", 1e9)
    monkeypatch.setattr(PathCosts, "exact_pays", lambda self, tokens, missing: not missing)
    async with on_skip(sequence_store_bytes=2**20, ngram_cache_bytes=2**20) as engine:
        await add(engine, "t", world.tenant(1, "plain", "exact"))
        assert (await engine.classify("t", [TEXTS[5]])).paths == ("plain",)
        await until(lambda: engine.snapshot().sequences["inserted"] == 1)
        for _ in range(3):
            assert (await engine.classify("t", [TEXTS[5]])).paths == ("stored",)
        assert not len(engine._core.parts.stores.ngrams.wanted(99))


async def test_large_batches_learn_beside_their_own_work(world, on_skip, monkeypatch):
    monkeypatch.setattr("runtime.ngram_learner._LOOK_S", 1e9)  # never idle
    module = world.tenant(1, "exact", "backoff")
    table = world.table(shortened(world.keys(TEXTS), 1))
    async with on_skip(ngrams=(table,), ngram_cache_bytes=2**20, max_backoff=1.0) as engine:
        await add(engine, "t", module)
        want = (await engine.classify("t", list(TEXTS))).probabilities
        before = engine.snapshot().ngrams["computed"]  # by self-tests
        async with asyncio.timeout(10):
            while engine.snapshot().ngrams["computed"] == before:  # what was missing twice, beside a later batch
                answer = await engine.classify("t", list(TEXTS) * 4)
                assert {*answer.paths} == {"backoff"}
                np.testing.assert_allclose(answer.probabilities, np.tile(want, (4, 1)), **CLOSE)
        await until(lambda: engine.snapshot().ngrams["inserted"] > 0)


async def test_who_does_not_share_teaches_nobody(world, on_skip):
    module, table = world.tenant(1, "backoff"), world.table(shortened(world.keys(TEXTS), 1))
    async with on_skip(
        ngrams=(table,), ngram_cache_bytes=2**20, max_backoff=1.0, sequence_sharing=("bank=own",)
    ) as engine:
        await add(engine, "bank", module)
        for _ in range(3):
            await engine.classify("bank", [TEXTS[1]])
        assert not len(engine._core.parts.stores.ngrams.wanted(1))


async def test_n_grams_that_cannot_be_computed_are_told_and_forgotten(world, on_skip, monkeypatch, caplog):
    module, table = world.tenant(1, "backoff"), world.table(shortened(world.keys(TEXTS), 1))
    async with on_skip(ngrams=(table,), ngram_cache_bytes=2**20, max_backoff=1.0) as engine:
        await add(engine, "t", module)
        local = engine._core.parts.model.local
        encode = local.encode
        monkeypatch.setattr(local, "encode", lambda keys, space=None: 1 / 0 if space is None else encode(keys, space))
        for _ in range(2):
            await engine.classify("t", [TEXTS[1]])
        await until(lambda: "could not be computed" in caplog.text)
        assert (await engine.classify("t", [TEXTS[1]])).paths == ("backoff",)


def a_store(world, **settings):
    """With a cache, and no cost at all."""
    free = PathCosts(*[lambda count: 0.0] * 4)
    skip, width = world.backbone.skip, world.backbone.config.hidden_size
    return NgramStore(skip, width, tables={}, cache_bytes=2**20, **{"costs": free} | settings)


def test_only_so_many_are_wanted(world, monkeypatch):
    monkeypatch.setattr("runtime.ngram_store._MOST_WANTED", 5)
    store, keys = a_store(world), np.unique(world.keys(TEXTS))
    for _ in range(2):
        store.note([keys])
    assert len(keys) > 5
    assert store.wanted(3).tolist() == keys[-5:-2].tolist()
    assert len(store.wanted(9)) == 2
    assert not len(store.wanted(9))


def test_what_was_computed_meanwhile_is_not_wanted_again(world):
    store, keys = a_store(world), np.unique(world.keys(TEXTS))
    for _ in range(2):
        store.note([keys])
    taken = store.wanted(3)
    store.keep(taken, torch.zeros(3, 3, world.backbone.config.hidden_size))
    store.note([keys])
    assert {*store.wanted(len(keys)).tolist()} == {*keys.tolist()} - {*taken.tolist()}


@pytest.mark.parametrize("paths", [("backoff",), ("plain", "exact")])
def test_only_who_shares_teaches(world, paths):
    dear = PathCosts(*[lambda count: 1.0] * 4)
    store, ids = a_store(world, costs=dear), [2, 7, 8, 9, 3]

    def missed(scope):
        routed = store.route([SequenceInput(ids, [0] * len(ids), None, paths=paths, scope=scope)])
        assert routed.paths == [paths[0]]
        store.skip(routed)
        return sum(len(keys) for keys in routed.missed()), routed.missed([0])

    assert [missed(scope) for scope in (b"", b"its own", None)] == [(len(ids), []), (0, []), (0, [])]
