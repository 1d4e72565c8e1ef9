"""The sequence store: whatever it holds, drops or shares, an answer is the one that is computed without it."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from runtime.entities import find_entities
from runtime.sequence_sharing import SequenceSharing
from runtime.sequence_store import SequenceStore
from tests.fakes import GatedPolicy
from tests.serving.helpers import Dense, add, held, softmax, until
from tests.tiny import PAIRS, TEXTS
from vbert.errors import ConfigError
from vbert.model import SequenceInput

CLOSE = {"rtol": 0, "atol": 1e-4}
WIDTH = 96


@pytest.fixture
def dense(backbone):
    return Dense(backbone)


def store_of(num_bytes=2**20, **more):
    return SequenceStore(layer=1, width=WIDTH, dtype=torch.float32, fingerprint="f", num_bytes=num_bytes, **more)


def text(i, length=4, scope=b""):
    ids = [1000 + i] * length
    return SequenceInput(ids, [0] * length, None, scope)


def states(sequence):
    """What a backbone would give: numbers that belong to these ids."""
    ids = torch.tensor(sequence.token_ids, dtype=torch.float32)
    return ids[:, None] + torch.arange(WIDTH) / 100 + 0.5 * sum(sequence.type_ids)


def ask(store, *sequences):
    """As a forward does: what is missing is computed and kept. Which were given, their rows checked."""
    found = store.find(sequences)
    assert torch.equal(found.rows, torch.cat([torch.empty(0, WIDTH), *(states(sequences[i]) for i in found.given)]))
    if found.wanted:
        store.insert(found, sequences, torch.cat([states(sequences[i]) for i in found.wanted]))
    return found.given


def upper(factory, *kinds, **more):
    """A tenant that changes nothing below the upper half."""
    module = factory.tenant(*kinds, **more)
    half = factory.config.num_layers // 2
    deltas = tuple(replace(d, layer=half + d.layer % half) for d in module.deltas if d.layer >= half)
    assert deltas
    return replace(module, deltas=deltas)


def dense_entities(dense, module, given):
    (encoded,) = dense.tokenizer.encode([given], offsets=True)
    (raw,) = dense.raw(module, [given])
    return [(e.start, e.end, e.label) for e in find_entities(given, encoded, softmax(raw), module.head.labels)]


# ---- the store by itself -----------------------------------------------------------------------------------------


def test_what_was_computed_is_given_the_next_time():
    store = store_of()
    assert ask(store, text(1), text(2)) == []
    assert ask(store, text(2), text(3), text(1)) == [0, 2]
    assert (store.counts.hits, store.counts.misses, store.counts.inserted) == (2, 3, 3)


def test_the_same_text_twice_in_a_batch_is_computed_once():
    store = store_of()
    found = store.find([text(1), text(2), text(1), text(1)])
    assert (found.first, found.wanted) == ([0, 1, 0, 0], [0, 1])
    assert not found.changes_nothing


def test_type_ids_and_length_tell_texts_apart():
    store = store_of()
    pair = replace(text(1), type_ids=[0, 0, 1, 1])
    assert ask(store, text(1), pair, text(1, length=8)) == []
    assert ask(store, pair) == [0]


def test_a_collision_never_gives_the_states_of_another_text(monkeypatch):
    store = store_of()
    monkeypatch.setattr(store, "_hash", lambda ids, scope: b"the same for all")
    assert ask(store, text(1)) == []
    assert ask(store, text(2)) == []
    assert ask(store, text(1)) == [0]
    assert ask(store, text(2)) == []


def test_who_shares_with_whom():
    store = store_of()
    own = store.salt("acme")
    assert own != store.salt("bank") != b""
    assert own != store_of().salt("acme")  # another secret
    assert ask(store, text(1, scope=own)) == []
    assert ask(store, text(1), text(1, scope=store.salt("bank"))) == []
    assert ask(store, text(1, scope=own)) == [0]
    found = store.find([text(1, scope=None), text(1)])
    assert (found.keys[0], found.first, found.given) == (None, [0, 1], [1])
    assert store.find([text(1, scope=None)]) is None


def test_a_scan_does_not_wipe_what_is_asked_for_often():
    """One request in ten is for one of twenty popular texts, the others never come again."""
    store, rng = store_of(120_000), random.Random(0)
    popular = [text(i) for i in range(20)]
    ask(store, *popular)
    hits = []
    for i in range(20_000):
        if i % 10:
            ask(store, text(100 + i))
        else:
            hits.append(len(ask(store, rng.choice(popular))))
    assert np.mean(hits[-500:]) > 0.9
    assert store.counts.refused > 10_000


def test_what_would_not_be_kept_is_not_asked_for():
    store = store_of(16_000)
    for _ in range(3):
        ask(store, *(text(i) for i in range(8)))
    found = store.find([text(100)])
    assert (found.wanted, found.changes_nothing) == ([], True)


def test_a_popular_long_text_replaces_short_ones_and_not_the_other_way_round():
    store = store_of(150_000)
    for i in range(60):
        ask(store, text(i))
    long = text(500, length=300)
    for _ in range(4):
        ask(store, long)
    assert ask(store, long) == [0]
    for i in range(1_000, 1_100):
        ask(store, text(i))
        ask(store, text(i))
    assert ask(store, long) == [0]


def test_what_becomes_popular_replaces_what_was():
    store = store_of(22_000)
    old, new = [text(i) for i in range(12)], [text(i) for i in range(100, 112)]
    for _ in range(3):
        ask(store, *old)
    for _ in range(40):
        ask(store, *new)
    assert len(ask(store, *new)) == store.num_entries
    assert not ask(store, *old)


@pytest.mark.parametrize("disk_bytes", [0, 60_000])
def test_any_traffic_keeps_the_bounds_and_the_numbers(tmp_path, disk_bytes):
    rng = random.Random(0)
    store = store_of(150_000, disk=tmp_path, disk_bytes=disk_bytes)
    for _ in range(600):
        batch = [text(int(rng.paretovariate(0.6)), rng.randint(1, 40)) for _ in range(rng.randint(1, 6))]
        ask(store, *batch)
        assert store.num_bytes <= 150_000
        assert store.disk_bytes <= disk_bytes
        for tier in store._tiers:
            rows = [row for entry in tier.entries.values() for row in entry.rows.tolist()]
            assert len(set(rows)) == len(rows) == tier.used
    assert store.counts.hits > 100
    assert store.counts.evicted > 10
    assert (store.counts.disk_hits > 10) == bool(disk_bytes)
    assert not list(tmp_path.iterdir())  # the file has no name


def test_what_found_no_room_in_memory_is_given_from_disk(tmp_path):
    store = store_of(80_000, disk=tmp_path, disk_bytes=200_000)
    everything = [text(i, length=16) for i in range(30)]
    for _ in range(3):
        ask(store, *everything)
    assert 0 < store.num_entries < 30
    assert ask(store, *everything) == list(range(30))
    assert store.counts.disk_hits


def test_entries_on_disk_are_few_enough_for_the_memory_that_finds_them(tmp_path):
    store = store_of(60_000, disk=tmp_path, disk_bytes=16 * WIDTH * 4 * 10)
    for i in range(200):
        ask(store, text(i, length=1))
    assert len(store._tiers[1].entries) == 10
    tiny = store_of(60_000, disk=tmp_path, disk_bytes=WIDTH * 4 * 3)  # not even one text of usual length
    for i in range(200):
        ask(tiny, text(i, length=1))
    assert tiny.disk_bytes == 0


def test_an_insertion_that_fails_leaves_no_row_behind(monkeypatch):
    store = store_of()
    found = store.find([text(1)])
    with pytest.raises(RuntimeError):
        store.insert(found, [text(1)], torch.zeros(4, WIDTH, dtype=torch.float64))
    assert (store.num_entries, store._tiers[0].used) == (0, 0)
    assert ask(store, text(1)) == []


def test_threads_may_ask_and_insert_at_once():
    store, wrong = store_of(100_000), []

    def run(seed):
        rng = random.Random(seed)
        try:
            for _ in range(150):
                ask(store, *(text(rng.randint(0, 40), 1 + rng.randint(0, 9)) for _ in range(4)))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_store_that_holds_not_one_row_is_refused():
    with pytest.raises(ConfigError, match=r"has 400 bytes of memory, .* a text takes about \d+; give it more"):
        store_of(400)


def test_sharing_rules():
    sharing = SequenceSharing(["acme.*=own", "bank=off"])
    assert sharing.scope("acme.intent", str.encode) == b"acme.intent"
    assert sharing.scope("bank", str.encode) is None
    assert sharing.scope("other", str.encode) == b""
    for rule in ("acme", "=own", "acme=never"):
        with pytest.raises(ConfigError, match=f"the rule '{rule}'"):
            SequenceSharing([rule])


# ---- in an engine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [("rows", "modules", "compute"), ("none",)])
async def test_answers_are_those_of_the_dense_reference(serving, factory, dense, lanes):
    modules = {
        "up": upper(factory, "lora", "houlsby"),
        "also-up": upper(factory, "ia3"),
        "low": factory.tenant("lora"),
        "head": factory.tenant(),
        "tagger": upper(factory, "lora", head="token_classify"),
    }
    policy = GatedPolicy()
    async with serving(policy=policy, sequence_store_bytes=2**20, lanes=lanes) as engine:
        for tenant, module in modules.items():
            await add(engine, tenant, module)
        for _ in range(3):
            policy.open = False
            asked = [
                asyncio.create_task(engine.classify(name, [*TEXTS, PAIRS[0]])) for name in modules if name != "tagger"
            ]
            bare = asyncio.create_task(engine.embed("tiny", TEXTS))
            tags = asyncio.create_task(engine.token_classify("tagger", TEXTS))
            await until(lambda: engine.snapshot().resident_modules == len(modules))
            policy.open = True
            answers = await asyncio.gather(*asked)
            for (_, module), answer in zip(modules.items(), answers, strict=False):
                want = dense.probabilities(module, [*TEXTS, PAIRS[0]])
                np.testing.assert_allclose(answer.probabilities, want, **CLOSE)
            np.testing.assert_allclose((await bare).embeddings, np.stack(dense.raw(None, TEXTS)), **CLOSE)
            want = [dense_entities(dense, modules["tagger"], given) for given in TEXTS]
            assert [[(e.start, e.end, e.label) for e in found] for found in (await tags).entities] == want
        seen = engine.snapshot()
        assert seen.reruns == 0
        assert seen.sequences["hits"] > 0
        assert seen.sequences["shared"] > 0
        assert seen.sequences["inserted"] == len(TEXTS) + 1
        assert seen.memory_bytes["sequences"] > 0


async def test_whoever_shares_stored_states_is_told_so(serving, factory):
    async with serving(sequence_store_bytes=2**20) as engine:
        await add(engine, "up", upper(factory, "bitfit"))
        assert (await engine.classify("up", [TEXTS[0], TEXTS[0], TEXTS[1]])).paths == ("plain",) * 3
        await until(lambda: engine.snapshot().sequences["inserted"] == 2)
        assert (await engine.classify("up", [TEXTS[0], TEXTS[0], TEXTS[2]])).paths == ("stored", "stored", "plain")


async def test_a_tenant_that_changes_a_lower_layer_takes_no_part(serving, factory, dense):
    low, up = factory.tenant("bitfit"), upper(factory, "bitfit")
    async with serving(sequence_store_bytes=2**20) as engine:
        await add(engine, "low", low)
        await add(engine, "up", up)
        for _ in range(2):
            for tenant, module in (("up", up), ("low", low)):
                answer = await engine.classify(tenant, TEXTS)
                np.testing.assert_allclose(answer.probabilities, dense.probabilities(module, TEXTS), **CLOSE)
        assert engine.snapshot().sequences["hits"] == len(TEXTS)


async def test_a_poisoned_entry_reaches_one_answer_and_no_more(serving, factory, dense):
    """States that are not numbers are computed anew, as everything of a batch that fails is."""
    module = upper(factory, "lora")
    async with serving(sequence_store_bytes=2**20) as engine:
        await add(engine, "up", module)
        await engine.classify("up", TEXTS)
        await until(lambda: engine.snapshot().sequences["inserted"] == len(TEXTS))
        engine._core.parts.stores.sequences._tiers[0].rows.fill_(float("nan"))
        answer = await engine.classify("up", TEXTS)
        np.testing.assert_allclose(answer.probabilities, dense.probabilities(module, TEXTS), **CLOSE)
        assert engine.snapshot().reruns == 1
        await engine.classify("up", TEXTS)  # it is gone
        assert engine.snapshot().reruns == 1


async def test_a_caller_who_leaves_takes_nothing_from_the_others(serving, factory, dense):
    """The batch was prepared with its text, from the store or not, and is prepared again without it."""
    module = upper(factory, "lora")
    async with serving(sequence_store_bytes=2**20) as engine:
        await add(engine, "up", module)
        await engine.classify("up", TEXTS[:3])
        for leaving in (TEXTS[0], TEXTS[4]):
            with held(engine._core.lanes.compute):
                left = asyncio.create_task(engine.classify("up", [leaving]))
                stays = asyncio.create_task(engine.classify("up", TEXTS[1:]))
                await until(lambda: engine.snapshot().in_flight_batches)
                left.cancel()
                await asyncio.sleep(0.01)
            answer = await stays
            np.testing.assert_allclose(answer.probabilities, dense.probabilities(module, TEXTS[1:]), **CLOSE)


async def test_tenants_of_their_own_and_without(serving, factory):
    module = upper(factory, "lora")
    async with serving(sequence_store_bytes=2**20, sequence_sharing=("own.*=own", "off=off")) as engine:
        for tenant in ("own.a", "own.b", "off", "shared"):
            await add(engine, tenant, module)
        counts = []
        for tenant in ("shared", "own.a", "own.b", "off", "own.a", "shared"):
            await engine.classify(tenant, TEXTS[:1])
            counts.append(engine.snapshot().sequences["hits"])
        assert counts == [0, 0, 0, 0, 1, 2]


async def test_mapped_words_are_gathered_for_what_is_computed_only(serving, factory, dense):
    module = upper(factory, "lora")
    async with serving(sequence_store_bytes=2**20, word_rows="mapped") as engine:
        await add(engine, "up", module)
        for texts in (TEXTS[:2], TEXTS[1:], TEXTS):
            answer = await engine.classify("up", texts)
            np.testing.assert_allclose(answer.probabilities, dense.probabilities(module, texts), **CLOSE)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sequence_layer": 99}, "sequence_layer is 99; the backbone has"),
        ({"sequence_disk_bytes": 2**60}, "are not to be had"),
        ({"sequence_store_bytes": 100}, "a text takes about"),
        ({"sequence_store_bytes": 0, "sequence_disk_bytes": 100}, "give sequence_store_bytes"),
    ],
)
async def test_what_cannot_be_had_is_said_at_the_start(serving, changes, says):
    with pytest.raises(ConfigError, match=says):
        async with serving(**({"sequence_store_bytes": 2**20} | changes)):
            pass
