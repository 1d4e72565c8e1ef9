"""Faults put in on purpose: a clear error to those it concerns, exact accounts, no lost future, and service goes on."""

import asyncio
import errno
import os

import pytest
import torch

from runtime.errors import ComputeFailed, ServerFull
from tests.fakes import ManualClock
from tests.serving.helpers import add, held, outcome, until
from tests.tiny import TEXTS
from vbert.arena import Arena
from vbert.errors import CorruptFile
from vbert.model import Model


def accounts(engine):
    """Everything that is counted, when nobody asks for anything."""
    now = engine.snapshot()
    manager, arena = engine._core.manager, engine._core.parts.arena
    owned = sum(len(c.owners) for c in arena._classes.values())
    slots = sum(len(entry.tenant.slots) for entry in manager._resident.values())
    held_bytes = sum(entry.tenant.num_bytes for entry in manager._resident.values())
    assert owned == slots, "a slot has an owner that is not in memory"
    assert sum(now.resident_bytes.values()) == held_bytes
    assert not any(entry.pins for entry in manager._resident.values())
    assert (now.loading_modules, now.queue_inputs, now.queue_tokens, now.in_flight_batches) == (0, 0, 0, 0)
    assert not engine._core.dispatcher._open
    return now


@pytest.fixture
def faulty(serving, factory):
    """An engine with a tenant `good` in memory and a tenant `bad` that is not."""

    async def check(bad, *, error, match):
        async with serving() as engine:
            await add(engine, "good", factory.tenant("lora"))
            await add(engine, "bad", factory.tenant("lora", "diff"))
            await engine.classify("good", TEXTS)
            bad(engine, (await engine.get_tenant("bad")).digest)
            asked = [engine.classify(tenant, TEXTS) for tenant in ("bad", "good", "bad", "bad")]
            first, good, *others = await asyncio.gather(*map(outcome, asked))
            for failed in (first, *others):
                assert isinstance(failed, error)
                assert match in failed.message
            assert good.tenant == "good"
            assert accounts(engine).resident_modules == 1

    return check


async def test_a_file_that_is_removed_while_it_is_loaded(faulty, monkeypatch):
    fill = Arena.fill

    def removed(arena, reservation, path, *more):
        if any(c.kind == "sparse" for c, _ in reservation.slots):
            os.unlink(path)
        return fill(arena, reservation, path, *more)

    monkeypatch.setattr(Arena, "fill", removed)
    await faulty(lambda engine, digest: None, error=CorruptFile, match="cannot be read")


async def test_a_disk_that_fails_in_the_middle_of_a_file(faulty, monkeypatch):
    preadv = os.preadv

    def broken(descriptor, buffers, offset):
        if os.fstat(descriptor).st_size > size:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(descriptor, buffers, offset)

    size = 0

    def arm(engine, digest):
        nonlocal size
        size = engine._core.parts.store.blob_path(digest).stat().st_size - 1
        monkeypatch.setattr(os, "preadv", broken)

    await faulty(arm, error=CorruptFile, match="Input/output error")


@pytest.mark.parametrize("keep", [0, 100, -1])
async def test_a_file_that_is_cut_or_altered(faulty, keep):
    def cut(engine, digest):
        path = engine._core.parts.store.blob_path(digest)
        data = path.read_bytes()
        path.write_bytes(data[:keep] if keep >= 0 else data[:-1] + bytes([data[-1] ^ 1]))

    await faulty(cut, error=CorruptFile, match="")


async def test_a_load_that_raises_what_nobody_expects(faulty, monkeypatch):
    fill = Arena.fill

    def broken(arena, reservation, path, *more):
        if any(c.kind == "sparse" for c, _ in reservation.slots):
            raise RuntimeError("cosmic ray")
        return fill(arena, reservation, path, *more)

    monkeypatch.setattr(Arena, "fill", broken)
    await faulty(lambda engine, digest: None, error=ComputeFailed, match="cosmic ray")


async def test_eviction_under_a_running_batch_waits_for_its_end(serving, factory):
    """The bytes of a slot in use never change: its owner leaves only with the last batch that reads it."""
    modules = {tenant: factory.tenant("lora") for tenant in "ab"}
    async with serving() as engine:
        for tenant, module in modules.items():
            await add(engine, tenant, module)
        expected = (await engine.classify("a", TEXTS)).probabilities
        manager = engine._core.manager
        (digest,) = manager.resident
        manager.budget_bytes = sum(engine.snapshot().resident_bytes.values())  # room for one
        with held(engine._core.lanes.compute) as release:
            running = asyncio.create_task(engine.classify("a", TEXTS))
            await until(lambda: manager._resident[digest].pins)
            other = asyncio.create_task(engine.classify("b", TEXTS))
            await until(lambda: manager._resident[digest].leaving)
            assert engine.snapshot().evictions == 0
            assert manager._resident[digest].tenant.owned()
            release()
            answer = await running
            assert (await other).tenant == "b"
        torch.testing.assert_close(answer.probabilities, expected, rtol=0, atol=1e-6)
        assert accounts(engine).evictions == 1


async def test_cancelled_callers_of_a_cold_tenant_leave_nothing_behind(serving, factory):
    async with serving() as engine:
        await add(engine, "t", factory.tenant("lora"))
        with held(engine._core.lanes.loader, 2) as release:
            asked = [asyncio.create_task(engine.classify("t", TEXTS)) for _ in range(5)]
            await until(lambda: engine.snapshot().loading_modules == 1)
            for task in asked[:-1]:
                task.cancel()
            release()
            assert (await asked[-1]).tenant == "t"
        assert accounts(engine).resident_modules == 1


@pytest.fixture
def small_memory(monkeypatch):
    """A device on which no forward of more than so many tokens fits."""
    launch = Model.launch

    def limited(model, batch, feed=None):
        if len(batch.rows.token_ids) > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return launch(model, batch, feed)

    limit = [10**9]
    monkeypatch.setattr(Model, "launch", limited)
    return limit


async def test_out_of_device_memory_costs_no_answer_and_pauses_admission(serving, factory, small_memory):
    clock = ManualClock(10.0)
    async with serving(clock=clock, max_batch_tokens=512) as engine:
        for tenant in "ab":
            await add(engine, tenant, factory.tenant("lora"))
        expected = {tenant: (await engine.classify(tenant, TEXTS)).probabilities for tenant in "ab"}
        longest = max(len(e.token_ids) for e in engine._core.parts.tokenizer.encode(TEXTS))
        small_memory[0] = longest
        with held(engine._core.lanes.compute) as release:
            asked = [asyncio.create_task(engine.classify(tenant, TEXTS)) for tenant in "aab"]
            await until(lambda: engine._core.pipeline.in_flight)
            release()
            answers = await asyncio.gather(*asked)
        for answer in answers:
            torch.testing.assert_close(answer.probabilities, expected[answer.tenant], rtol=0, atol=1e-5)
        assert engine.snapshot().out_of_memory > 0
        with pytest.raises(ServerFull, match="ran out of memory") as refused:
            await engine.classify("a", TEXTS)
        assert 0 < refused.value.retry_after_s <= 1.0
        clock.now += 1.0
        assert engine._core.loop.view().max_batch_tokens < 512
        assert (await engine.classify("a", TEXTS)).tenant == "a"
        small_memory[0] = 10**9
        for _ in range(60):
            clock.now += 1.0
            await engine.classify("a", TEXTS * 6)
        assert engine._core.loop.view().max_batch_tokens == 512
        accounts(engine)


async def test_one_input_that_never_fits_is_that_requests_trouble(serving, factory, small_memory):
    clock = ManualClock(10.0)
    async with serving(clock=clock) as engine:
        await add(engine, "t", factory.tenant("lora"))
        lengths = [len(e.token_ids) for e in engine._core.parts.tokenizer.encode(TEXTS)]
        short = TEXTS[lengths.index(min(lengths))]
        await engine.classify("t", TEXTS)
        small_memory[0] = min(lengths)
        failed = await outcome(engine.classify("t", [TEXTS[lengths.index(max(lengths))]]))
        assert isinstance(failed, ComputeFailed)
        assert "out of memory" in failed.message
        clock.now += 1.0
        assert (await engine.classify("t", [short])).tenant == "t"
        accounts(engine)


async def test_forwards_that_fail_keep_no_memory(serving, factory, monkeypatch):
    from vbert.encoder import Encoder

    async with serving() as engine:
        await add(engine, "t", factory.tenant("lora"))
        await engine.classify("t", TEXTS)
        model, layer = engine._core.parts.model, Encoder.layer
        before = model.activation_bytes
        monkeypatch.setattr(Encoder, "layer", broken)
        for _ in range(3):
            assert isinstance(await outcome(engine.classify("t", TEXTS)), ComputeFailed)
        monkeypatch.setattr(Encoder, "layer", layer)
        assert (await engine.classify("t", TEXTS)).tenant == "t"
        assert model.activation_bytes == before


def broken(*_):
    raise RuntimeError("a bug")
