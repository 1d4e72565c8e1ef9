"""N-grams that texts did without are learnt for later ones: when, by whom, and how many are waited for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from runtime.ngram_learner import NgramLearner
from runtime.ngram_store import NgramStore, PathCosts
from runtime.streams import CpuDevice
from tests.serving.helpers import add, until
from tests.tiny import TEXTS
from vbert.ngram.index import shortened
from vbert.packing import SequenceInput

CLOSE = {"rtol": 0, "atol": 1e-3}  # rows of tables are float16


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


class Now:
    seconds = 0.0

    def now_s(self):
        return self.seconds


async def learn(world, monkeypatch, encode, idle, now):
    """A learner of 4,000 n-grams for a hundred seconds that nobody waits for."""

    async def sleep(seconds, really=asyncio.sleep):
        now.seconds += seconds
        await really(0)
        if now.seconds > 100:
            raise asyncio.CancelledError

    store, keys = a_store(world), np.arange(1, 4001, dtype=np.uint64) << 21
    for _ in range(2):
        store.note([keys])
    mine = SimpleNamespace(sleep=sleep, get_running_loop=asyncio.get_running_loop)  # nobody else's sleep
    monkeypatch.setattr("runtime.ngram_learner.asyncio", mine)
    local = SimpleNamespace(encode=encode)
    learner = NgramLearner(ngrams=store, local=local, device=CpuDevice(now), compute=None, idle=idle, clock=now)
    with pytest.raises(asyncio.CancelledError):
        await learner.run()
    return store


async def test_learning_takes_a_hundredth_of_the_time_of_a_busy_server(world, monkeypatch):
    now, computed, visits = Now(), [], []

    def encode(keys):
        now.seconds += 0.02
        computed.append(now.seconds)
        return torch.zeros(len(keys), 3, world.backbone.config.hidden_size)

    def idle():
        if len(computed) == 100 and not visits:
            visits.append("short")
            return False
        return len(computed) >= 30

    store = await learn(world, monkeypatch, encode, idle, now)
    assert computed[29] == pytest.approx(30 * 0.02 / 0.01, rel=0.05)
    assert not store.may_want  # idle at last
    pauses = np.diff(computed[30:]) - 0.02
    assert pauses[69] == pytest.approx(2 * 0.05)  # after a hundred somebody comes: idle is what looks so twice
    assert np.delete(pauses, 69) == pytest.approx(0, abs=1e-9)


async def test_a_learner_that_fails_looks_before_it_goes_on(world, monkeypatch):
    now, tried = Now(), []

    def encode(keys):
        now.seconds += 0.02
        tried.append(now.seconds)
        raise RuntimeError("no room")

    await learn(world, monkeypatch, encode, lambda: True, now)
    assert len(tried) == 500
    assert min(np.diff(tried)) >= 0.05


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
