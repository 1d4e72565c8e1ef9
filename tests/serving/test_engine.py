"""The engine end to end on a tiny real backbone: every answer is the dense reference's answer."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from runtime import Engine
from runtime.errors import Draining, InvalidTenantId, VersionConflict
from runtime.store import TenantStore
from tests.fakes import GatedPolicy
from tests.random_tenants import DELTA_KINDS, HEADS
from tests.serving.helpers import Dense, add, held, outcome, softmax, until, waiting
from tests.tiny import PAIRS, TEXTS
from vbert.errors import BadRequest, ConfigError, UnknownTenant

CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def dense(backbone):
    return Dense(backbone)


async def test_every_kind_in_one_batch_equals_the_dense_reference(serving, factory, dense):
    modules = {f"t-{kind}-{head}": factory.tenant(kind, head=head) for kind in DELTA_KINDS for head in HEADS[:4]}
    policy = GatedPolicy()
    async with serving(policy=policy, max_batch_tokens=100_000) as engine:
        for tenant, module in modules.items():
            await add(engine, tenant, module)
        policy.open = False
        asked = [asyncio.create_task(engine.classify(tenant, TEXTS[:3])) for tenant in modules]
        await until(lambda: engine.snapshot().resident_modules == len(modules))
        policy.open = True
        answers = await asyncio.gather(*asked)
        assert engine.snapshot().reruns == 0
        assert engine.snapshot().batch_tokens.p99 > len(modules) * 20
    for (tenant, module), answer in zip(modules.items(), answers, strict=True):
        np.testing.assert_allclose(answer.probabilities, dense.probabilities(module, TEXTS[:3]), **CLOSE)
        assert (answer.tenant, answer.version, answer.problem) == (tenant, 1, module.head.problem)


async def test_embed_of_the_backbone_and_of_a_tenant(serving, factory, dense):
    module = factory.tenant("lora", head="embed")
    async with serving() as engine:
        await add(engine, "e", module)
        ids = dense.tokenizer.encode(["no"])[0].token_ids
        mine, base = await engine.embed("e", TEXTS), await engine.embed("tiny", [*TEXTS, PAIRS[0], ids])
    np.testing.assert_allclose(mine.embeddings, np.stack(dense.raw(module, TEXTS)), **CLOSE)
    np.testing.assert_allclose(base.embeddings, np.stack(dense.raw(None, [*TEXTS, PAIRS[0], ids])), **CLOSE)
    np.testing.assert_allclose(np.linalg.norm(base.embeddings, axis=1), 1.0, rtol=1e-5)
    assert (base.tenant, base.version) == ("tiny", 0)
    assert base.embeddings.dtype == np.float32


async def test_pairs_scores_and_ranks(serving, factory, dense):
    module, two = factory.tenant("houlsby", head="rerank"), factory.tenant("lora", num_labels=2)
    documents = list(TEXTS)
    pairs = [("station", document) for document in documents]
    async with serving() as engine:
        await add(engine, "r", module)
        await add(engine, "two", two)
        ranked = await engine.rerank("r", "station", documents, top_n=3)
        scored = await engine.score("r", pairs)
        judged = await engine.score("two", pairs)
    expected = 1 / (1 + np.exp(-np.stack(dense.raw(module, pairs))[:, 0]))
    np.testing.assert_allclose(scored.scores, expected, **CLOSE)
    np.testing.assert_allclose(ranked.scores, expected, **CLOSE)
    assert ranked.order == tuple(np.argsort(-expected)[:3])
    np.testing.assert_allclose(judged.scores, softmax(np.stack(dense.raw(two, pairs)))[:, 1], **CLOSE)


async def test_token_labels_of_texts_and_of_words(serving, factory, dense):
    module = factory.tenant("pfeiffer", head="token_classify")
    text, words = "please transfer 20 euros", ["please", "transfer", "20", "euros"]
    async with serving() as engine:
        await add(engine, "n", module)
        answer = await engine.token_classify("n", [text, words])
    best = softmax(dense.raw(module, [text])[0])[1:-1]  # every word of it is one token
    assert "".join(f"{e.text} " for e in answer.entities[0]).split() == words
    for entity in answer.entities[0]:
        assert text[entity.start : entity.end] == entity.text
    spans = [word for e in answer.entities[1] for word in range(e.start, e.end)]
    assert spans == [0, 1, 2, 3]
    labels = [e.label for e in answer.entities[1] for _ in range(e.start, e.end)]
    assert labels == [f"label{i}" for i in best.argmax(1)]


async def test_long_token_classification_is_decoded_beside_the_loop(serving, factory):
    async with serving() as engine:
        await add(engine, "n", factory.tenant(head="token_classify"))
        answer = await engine.token_classify("n", [TEXTS[5]] * 600)
    assert sum(answer.tokens) > 8192
    assert len({*answer.entities}) == 1


async def test_a_version_is_fixed_when_the_request_is_admitted(serving, factory, dense):
    first, second = factory.tenant("lora"), factory.tenant("bitfit", num_labels=4)
    policy = GatedPolicy()
    async with serving(policy=policy) as engine:
        await add(engine, "t", first)
        policy.open = False
        before = asyncio.create_task(engine.classify("t", TEXTS))
        await waiting(engine, len(TEXTS))
        await add(engine, "t", second)
        after = asyncio.create_task(engine.classify("t", TEXTS))
        await waiting(engine, 2 * len(TEXTS))
        await engine.remove_tenant("t")
        with pytest.raises(UnknownTenant):
            await engine.classify("t", TEXTS)
        policy.open = True
        old, new = await before, await after
    assert (old.version, new.version) == (1, 2)
    np.testing.assert_allclose(old.probabilities, dense.probabilities(first, TEXTS), **CLOSE)
    np.testing.assert_allclose(new.probabilities, dense.probabilities(second, TEXTS), **CLOSE)


async def test_activate_and_roll_back(serving, factory):
    async with serving() as engine:
        for _ in range(3):
            await add(engine, "t", factory.tenant("lora"))
        assert [v.version for v in await engine.versions("t")] == [1, 2, 3]
        await engine.activate("t", 1)
        assert (await engine.classify("t", ["no"])).version == 1
        with pytest.raises(VersionConflict):
            await engine.rollback("t", if_match=3)
        assert (await engine.rollback("t", if_match=1)).version == 3
        assert (await engine.classify("t", ["no"])).version == 3
        assert (await engine.get_tenant("t")).active
        assert [v.tenant for v in await engine.list_tenants()] == ["t"]


async def test_put_is_idempotent_and_files_of_removed_tenants_go(serving, factory, tmp_path):
    from vbert.checkpoint import write_tenant

    data = write_tenant(factory.tenant("lora"))
    async with serving() as engine:
        version, created = await engine.put_tenant("t", data)
        assert created
        assert await engine.put_tenant("t", data) == (version, False)
        await engine.classify("t", ["no"])
        assert engine.snapshot().resident_modules == 1
        await engine.remove_tenant("t")
        assert engine.snapshot().resident_modules == 0
        assert not list((tmp_path / "store").rglob("*.safetensors"))


async def test_what_another_process_removed_leaves_memory_and_disk(serving, factory, tmp_path):
    files = tmp_path / "store"
    async with serving(canary_interval_s=0.01) as engine:
        await add(engine, "t", factory.tenant("lora"))
        await engine.classify("t", ["no"])
        with TenantStore(files) as theirs:
            theirs.remove("t")
            await until(lambda: engine.snapshot().resident_modules == 0)
            assert len(list(files.rglob("*.safetensors"))) == 1  # the other process may be about to read it
        await until(lambda: not list(files.rglob("*.safetensors")))
        with pytest.raises(UnknownTenant):
            await engine.classify("t", ["no"])


@pytest.mark.parametrize(
    ("method", "error"),
    [("garbage", ConfigError("disk I/O error")), ("collect_garbage", PermissionError(13, "Permission denied"))],
)
async def test_a_store_that_cannot_be_cleaned_up_is_served_on(serving, factory, monkeypatch, caplog, method, error):
    def fails(*_):
        raise error

    async with serving(canary_interval_s=0.01) as engine:
        await add(engine, "t", factory.tenant("lora"))
        await add(engine, "u", factory.tenant("lora"))
        monkeypatch.setattr(engine._core.parts.store, method, fails)
        await engine.remove_tenant("t")
        await until(lambda: caplog.text.count("could not be deleted") >= 3)
        assert (await engine.classify("u", ["no"])).version == 1
        assert engine.ready().ready


async def test_a_file_that_an_admitted_request_needs_stays(serving, factory, tmp_path):
    """The tenant is removed by another process between admission and loading."""
    files = tmp_path / "store"
    async with serving() as engine:
        await add(engine, "t", factory.tenant("lora"))
        with held(engine._core.lanes.loader, 2):
            asked = asyncio.create_task(engine.classify("t", ["no"]))
            await until(lambda: engine.snapshot().loading_modules == 1)
            with TenantStore(files) as theirs:
                theirs.remove("t")
            await engine._core.collect_garbage()
            assert len(list(files.rglob("*.safetensors"))) == 1
        assert (await asked).version == 1
        await engine._core.collect_garbage()
        assert not list(files.rglob("*.safetensors"))


async def test_a_request_admitted_while_garbage_is_looked_for_keeps_its_file(serving, factory, tmp_path):
    """Removed after `garbage` was read: what was found there is deleted and nothing else."""
    async with serving() as engine:
        await add(engine, "old", factory.tenant("lora"))
        await add(engine, "t", factory.tenant("lora"))
        core = engine._core
        core.parts.store.remove("old")

        def in_use():
            core.parts.store.remove("t")
            return set()

        assert len(await core.tenants.collect(in_use)) == 1
        assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 1


async def test_a_native_file_is_added_by_its_path(serving, factory, tmp_path):
    from vbert.checkpoint import write_tenant

    data = write_tenant(factory.tenant("diff"))
    (tmp_path / "t.safetensors").write_bytes(data)
    async with serving() as engine:
        version = await engine.add_tenant("t", tmp_path / "t.safetensors")
        assert version.num_bytes == len(data)
        assert version.kinds == ("affine", "sparse")


async def test_timings_name_every_stage_and_add_up(serving, factory):
    async with serving() as engine:
        await add(engine, "t", factory.tenant("lora"))
        cold, warm = await engine.classify("t", TEXTS), await engine.classify("t", TEXTS)
    for timings in (cold.timings, warm.timings):
        parts = (timings.tokenize_s, timings.queue_s, timings.load_s, timings.compute_s)
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(timings.total_s, rel=0.01, abs=1e-4)
    assert cold.timings.load_s > 0
    assert warm.timings.load_s == 0


async def test_counters_tell_what_happened(serving, factory):
    async with serving() as engine:
        await add(engine, "t", factory.tenant("lora", "bitfit"))
        await engine.classify("t", TEXTS)
        await outcome(engine.classify("nobody", TEXTS))
        now = engine.snapshot()
    assert now.requests == {("canary", "ok"): 1, ("classify", "ok"): 1, ("classify", "unknown_tenant"): 1}
    assert now.computed_inputs == {"low_rank": len(TEXTS), "affine": len(TEXTS), "backbone": 1}
    assert now.inputs["classify"] == len(TEXTS)
    assert now.loads == {"ok": 1}
    assert set(now.resident_bytes) == {"low_rank", "affine", "head"}


async def test_the_backbones_name_belongs_to_the_backbone(serving, config, factory):
    async with serving() as engine:
        with pytest.raises(InvalidTenantId, match="name of the backbone"):
            await add(engine, "tiny", factory.tenant("lora"))
        await add(engine, "other", factory.tenant("lora"))
    with pytest.raises(ConfigError, match="other"):
        await Engine(config(name="other")).start()


async def test_stop_finishes_what_was_admitted(config):
    policy = GatedPolicy()
    engine = Engine(config(), policy=policy)
    await engine.start()
    policy.open = False
    asked = asyncio.create_task(engine.embed("tiny", TEXTS))
    await waiting(engine, len(TEXTS))
    stopping = asyncio.create_task(engine.stop())
    await until(lambda: not engine.ready().ready)
    with pytest.raises(Draining):
        await engine.embed("tiny", ["late"])
    assert not stopping.done()
    policy.open = True
    await stopping
    assert (await asked).embeddings.shape == (len(TEXTS), 32)
    assert engine.ready().reasons == ("stopped",)
    with pytest.raises(Draining):
        await engine.embed("tiny", ["late"])
    await engine.stop()


async def test_stop_does_not_wait_for_ever(config):
    policy = GatedPolicy()
    engine = Engine(config(drain_timeout_s=0.05), policy=policy)
    await engine.start()
    policy.open = False
    asked = asyncio.create_task(engine.embed("tiny", TEXTS))
    await waiting(engine, len(TEXTS))
    await engine.stop()
    with pytest.raises(Draining, match=r"after 0\.05 s"):
        await asked


async def test_an_engine_that_is_not_started_says_so(config):
    engine = Engine(config())
    assert engine.ready().reasons == ("not started",)
    with pytest.raises(ConfigError, match="not started"):
        await engine.embed("tiny", ["x"])


@pytest.mark.parametrize("change", [{"backbone": ""}, {"store": ""}])
async def test_a_folder_must_be_given(config, change):
    with pytest.raises(ConfigError, match="give a folder"):
        await Engine(config(**change)).start()


async def test_roll_back_without_a_version_before(serving, factory):
    async with serving() as engine:
        await add(engine, "t", factory.tenant("lora"))
        with pytest.raises(BadRequest, match="no version before"):
            await engine.rollback("t")


async def test_a_text_that_is_being_tokenised_when_time_is_up_is_told(config):
    engine = Engine(config(drain_timeout_s=0.01, max_input_chars=1_000_000))
    await engine.start()
    asked = [asyncio.create_task(engine.embed("tiny", ["word " * 100_000], truncate=True)) for _ in range(3)]
    await until(lambda: engine._core.dispatcher.num_open == 3)
    await engine.stop()
    for answer in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(answer, Draining)
    with pytest.raises(Draining):
        await engine.list_tenants()


async def test_a_tenant_is_a_name(serving):
    async with serving() as engine:
        with pytest.raises(BadRequest, match="of type int"):
            await engine.embed(3, ["a"])
