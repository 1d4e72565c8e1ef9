"""Modules that come and go: one load for many requests, a budget that holds, and bad tenants that fail alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from runtime.errors import ComputeFailed, ModuleTooLarge, RequestTooLarge, StoreFull
from tests.fakes import GatedPolicy, ManualClock
from tests.random_tenants import DELTA_KINDS
from tests.serving.helpers import Dense, add, held, outcome, until, waiting
from tests.tiny import TEXTS
from vbert.arena import Arena
from vbert.checkpoint import write_tenant
from vbert.errors import CorruptFile, RefusedCheckpoint, SelfTestFailed, WrongBackbone
from vbert.header import parse_header
from vbert.selftest import load_self_tests, make_self_tests

CLOSE = {"rtol": 0, "atol": 1e-4}


async def test_concurrent_requests_for_one_cold_tenant_load_it_once(serving, factory):
    async with serving() as engine:
        await add(engine, "t", factory.tenant("lora"))
        answers = await asyncio.gather(*[engine.classify("t", TEXTS) for _ in range(40)])
        assert engine.snapshot().loads == {"ok": 1}
    assert all(answer.timings.load_s > 0 for answer in answers)


async def test_two_names_with_the_same_content_share_one_slot(serving, factory):
    module = factory.tenant("lora")
    async with serving() as engine:
        await add(engine, "a", module)
        await add(engine, "b", module)
        first, second = await asyncio.gather(engine.classify("a", TEXTS), engine.classify("b", TEXTS))
        assert engine.snapshot().resident_modules == 1
        assert (first.tenant, second.tenant) == ("a", "b")


async def test_resident_tenants_go_on_while_a_load_hangs(serving, factory):
    """The loader threads are busy for as long as the test likes; who is in memory does not notice."""
    async with serving() as engine:
        await add(engine, "warm", factory.tenant("lora"))
        await add(engine, "cold", factory.tenant("lora"))
        await engine.classify("warm", TEXTS)
        with held(engine._core.lanes.loader, 2) as release:
            cold = asyncio.create_task(engine.classify("cold", TEXTS))
            await until(lambda: engine.snapshot().loading_modules == 1)
            for _ in range(5):
                await engine.classify("warm", TEXTS)
            assert not cold.done()
            release()
            assert (await cold).tenant == "cold"


@pytest.fixture
def sizes(backbone):
    arena = Arena(backbone.config, backbone.fingerprint, torch.float32, 2**20)
    return lambda module: arena.num_bytes(parse_header(write_tenant(module)))


async def test_the_budget_holds_and_eviction_is_the_identity(serving, factory, backbone, sizes):
    modules = {f"t{i}": factory.tenant(DELTA_KINDS[i % len(DELTA_KINDS)]) for i in range(22)}
    budget = 3 * max(sizes(module) for module in modules.values())
    dense, answers = Dense(backbone), {}
    async with serving(module_budget_bytes=budget) as engine:
        for tenant, module in modules.items():
            await add(engine, tenant, module)
        for round_ in range(3):
            for tenant, module in modules.items():
                answer = await engine.classify(tenant, TEXTS[:2])
                np.testing.assert_allclose(answer.probabilities, dense.probabilities(module, TEXTS[:2]), **CLOSE)
                if round_:  # the first time self-tests are in the batch, and sums may come in another order
                    first = answers.setdefault(tenant, answer)
                    np.testing.assert_array_equal(first.probabilities, answer.probabilities)
                now = engine.snapshot()
                assert 0 < sum(now.resident_bytes.values()) <= budget
        resident = engine._core.manager.resident
        digests = {v.digest: modules[v.tenant] for v in await engine.list_tenants()}
        assert sum(now.resident_bytes.values()) == sum(sizes(digests[digest]) for digest in resident)
        assert now.evictions > 22


async def test_more_tenants_at_once_than_fit(serving, factory, sizes):
    """Every one gets its turn although the memory holds two: a module stays until its requests ran."""
    modules = {f"t{i}": factory.tenant("lora") for i in range(30)}
    async with serving(module_budget_bytes=2 * sizes(modules["t0"])) as engine:
        for tenant, module in modules.items():
            await add(engine, tenant, module)
        answers = await asyncio.gather(*[engine.classify(tenant, TEXTS) for tenant in modules for _ in range(3)])
        assert engine.snapshot().loads == {"ok": 30}
    assert len(answers) == 90


async def test_a_full_memory_waits_for_what_is_in_use(serving, factory, sizes):
    module, other = factory.tenant("lora"), factory.tenant("lora")
    policy = GatedPolicy()
    async with serving(module_budget_bytes=sizes(module), policy=policy) as engine:
        await add(engine, "a", module)
        await add(engine, "b", other)
        policy.open = False
        first = asyncio.create_task(engine.classify("a", TEXTS))
        await until(lambda: engine.snapshot().resident_modules == 1)
        second = asyncio.create_task(engine.classify("b", TEXTS))
        await waiting(engine, 2 * len(TEXTS))
        await until(lambda: engine.snapshot().loading_modules == 1)
        assert engine.snapshot().evictions == 0
        policy.open = True
        assert [(await task).tenant for task in (first, second)] == ["a", "b"]
        assert engine.snapshot().evictions == 1


async def test_a_load_that_waits_for_room_notices_that_the_other_caller_left(serving, factory, sizes):
    module, policy = factory.tenant("lora"), GatedPolicy()
    async with serving(module_budget_bytes=sizes(module), policy=policy) as engine:
        await add(engine, "a", module)
        await add(engine, "b", factory.tenant("lora"))
        policy.open = False
        first = asyncio.create_task(engine.classify("a", TEXTS))
        await until(lambda: engine.snapshot().resident_modules == 1)
        second = asyncio.create_task(engine.classify("b", TEXTS))
        await until(lambda: engine.snapshot().loading_modules == 1)
        first.cancel()
        await until(lambda: engine.snapshot().evictions == 1)
        policy.open = True
        assert (await second).tenant == "b"


# ---- bad tenants ---------------------------------------------------------------------------------------------------


async def test_a_damaged_file_fails_its_tenant_alone_and_is_read_again_later(serving, factory):
    clock = ManualClock(10.0)
    async with serving(clock=clock) as engine:
        await add(engine, "good", factory.tenant("lora"))
        await add(engine, "bad", factory.tenant("lora"))
        path = engine._core.parts.store.blob_path((await engine.get_tenant("bad")).digest)
        data = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(data[:-100])
        answers = await asyncio.gather(
            *[outcome(engine.classify(tenant, TEXTS)) for tenant in ("bad", "good", "bad", "good")]
        )
        assert [type(answer) is CorruptFile for answer in answers] == [True, False, True, False]
        assert answers[0] is not answers[2]
        assert engine.snapshot().loads == {"ok": 1, "corrupt_file": 1}
        path.write_bytes(data)
        assert isinstance(await outcome(engine.classify("bad", TEXTS)), CorruptFile)  # remembered for a moment
        assert engine.snapshot().loads == {"ok": 1, "corrupt_file": 1}
        clock.now += 1.0
        assert (await engine.classify("bad", TEXTS)).tenant == "bad"
        path.unlink()
        assert (await engine.classify("bad", TEXTS)).tenant == "bad"  # in memory


async def test_a_missing_file_is_a_clear_error(serving, factory):
    async with serving() as engine:
        await add(engine, "gone", factory.tenant("lora"))
        engine._core.parts.store.blob_path((await engine.get_tenant("gone")).digest).unlink()
        with pytest.raises(CorruptFile, match="add the tenant again"):
            await engine.classify("gone", TEXTS)


async def test_bad_uploads_are_refused_at_registration(serving, factory, tmp_path):
    good = write_tenant(factory.tenant("lora"))
    nan = good[:-4] + np.float32("nan").tobytes()
    foreign = write_tenant(replace(factory.tenant("lora"), backbone_fingerprint="sha256:" + "0" * 64))
    async with serving(max_module_bytes=len(good) + 10_000) as engine:
        for data, error in (
            (good[:-10], CorruptFile),
            (nan, CorruptFile),
            (b"", CorruptFile),
            (foreign, WrongBackbone),
        ):
            with pytest.raises(error):
                await engine.put_tenant("t", data)
        with pytest.raises(RequestTooLarge, match="the limit is"):
            await engine.put_tenant("t", good + b"x" * 20_000)
        with pytest.raises((RefusedCheckpoint, CorruptFile)):
            await engine.add_tenant("t", tmp_path)
        assert await engine.list_tenants() == []


async def test_a_full_store_takes_no_more_until_a_tenant_is_removed(serving, factory):
    one, two = (write_tenant(factory.tenant("lora")) for _ in range(2))
    async with serving(max_store_bytes=len(one) + len(two) - 1) as engine:
        await engine.put_tenant("a", one)
        with pytest.raises(StoreFull, match=f"its limit is {len(one) + len(two) - 1}"):
            await engine.put_tenant("b", two)
        assert [version.tenant for version in await engine.list_tenants()] == ["a"]
        await engine.remove_tenant("a")
        assert (await engine.put_tenant("b", two))[1]


async def test_a_module_larger_than_all_memory_is_refused(serving, factory):
    async with serving(module_budget_bytes=1000) as engine:
        with pytest.raises(ModuleTooLarge, match="module_budget_bytes is 1000"):
            await add(engine, "t", factory.tenant("lora"))


# ---- self-tests ----------------------------------------------------------------------------------------------------


async def test_self_tests_are_made_once_by_the_dense_reference_and_kept(serving, factory):
    async with serving() as engine:
        await add(engine, "t", factory.tenant("lora"))
        store = engine._core.parts.store
        digest = (await engine.get_tenant("t")).digest
        assert store.self_tests(digest) is None
        await engine.classify("t", TEXTS)
        assert len(load_self_tests(store.self_tests(digest))) == 3


async def test_a_full_disk_does_not_keep_a_tenant_from_loading(serving, factory, monkeypatch, caplog):
    def full(*_):
        raise StoreFull("the disk is full")

    async with serving() as engine:
        await add(engine, "t", factory.tenant("lora"))
        monkeypatch.setattr(engine._core.parts.store, "set_self_tests", full)
        assert (await engine.classify("t", TEXTS)).version == 1
    assert "could not be kept: the disk is full" in caplog.text


async def test_other_numbers_than_stored_refuse_the_load_and_free_the_slot(serving, factory, backbone):
    dense = Dense(backbone)
    module = factory.tenant("lora")
    tests = make_self_tests(backbone, module, dense.tokenizer)
    off = replace(tests[1], expected=tests[1].expected + 0.01)
    async with serving() as engine:
        await add(engine, "right", replace(module, self_tests=tests))
        await add(engine, "wrong", replace(module, self_tests=(tests[0], off)))
        with pytest.raises(SelfTestFailed, match=r"self-test 1 is off by 0\.01"):
            await engine.classify("wrong", TEXTS)
        now = engine.snapshot()
        assert (now.resident_modules, sum(now.resident_bytes.values())) == (0, 0)
        assert now.loads == {"ok": 1, "self_test_failed": 1}
        assert (await engine.classify("right", TEXTS)).tenant == "right"
        assert engine._core.parts.store.self_tests((await engine.get_tenant("right")).digest) is None


async def test_a_cold_tenant_costs_no_batch_of_its_own(serving, factory):
    """Its self-tests run beside the request, once."""
    async with serving() as engine:
        await add(engine, "t", factory.tenant("lora"))
        before = engine.snapshot()
        await engine.classify("t", TEXTS)
        first = engine.snapshot()
        await engine.classify("t", TEXTS)
        second = engine.snapshot()
    assert (first.batches - before.batches, second.batches - first.batches) == (1, 1)
    tokens = [b.batch_tokens.total - a.batch_tokens.total for a, b in ((before, first), (first, second))]
    assert tokens[0] > tokens[1] > 0


async def test_no_batch_in_flight_answers_for_a_module_that_fails(serving, factory, backbone):
    """Both batches that were launched before the verdict carry the self-tests, and neither answers."""
    module = factory.tenant("lora")
    test = make_self_tests(backbone, module, Dense(backbone).tokenizer)[0]
    async with serving(max_batch_tokens=16) as engine:
        await add(engine, "wrong", replace(module, self_tests=(replace(test, expected=test.expected + 1),)))
        with held(engine._core.lanes.compute) as release:
            asked = [asyncio.create_task(outcome(engine.classify("wrong", [text]))) for text in TEXTS]
            await until(lambda: engine._core.pipeline.in_flight == 2)
            release()
            answers = await asyncio.gather(*asked)
    assert len(asked) > 2
    assert all(isinstance(answer, SelfTestFailed) for answer in answers)


async def test_numbers_that_are_not_finite_fail_their_tenant_alone(serving, factory):
    """Weights are finite and overflow in use: found by the self-tests, told by the first request."""
    huge = factory.tenant("lora")
    huge = replace(huge, deltas=tuple(replace(d, a=d.a * 1e30, b=d.b * 1e30) for d in huge.deltas))
    async with serving() as engine:
        await add(engine, "huge", huge)
        await add(engine, "good", factory.tenant("lora"))
        bad, good = await asyncio.gather(
            outcome(engine.classify("huge", TEXTS)), outcome(engine.classify("good", TEXTS))
        )
    assert isinstance(bad, ComputeFailed | SelfTestFailed)
    assert good.tenant == "good"


async def test_a_tenant_in_use_takes_no_new_batch_while_another_waits_for_its_room(serving, factory, sizes):
    """Otherwise overlapping batches would pin it for ever."""
    modules = [factory.tenant("lora"), factory.tenant("lora")]
    async with serving(module_budget_bytes=sizes(modules[0])) as engine:
        await add(engine, "hot", modules[0])
        await add(engine, "cold", modules[1])
        await engine.classify("hot", TEXTS)
        hot = (await engine.get_tenant("hot")).digest
        with held(engine._core.lanes.compute) as release:
            first = asyncio.create_task(engine.classify("hot", TEXTS))
            await until(lambda: engine.snapshot().in_flight_batches == 1)
            cold = asyncio.create_task(engine.classify("cold", TEXTS))
            await until(lambda: not engine._core.manager.is_ready(hot))
            again = asyncio.create_task(engine.classify("hot", TEXTS))
            await waiting(engine, 2 * len(TEXTS))
            await asyncio.sleep(0.05)
            assert engine.snapshot().in_flight_batches == 1
            release()
            assert [(await task).tenant for task in (first, cold, again)] == ["hot", "cold", "hot"]
        assert engine.snapshot().loads == {"ok": 3}
