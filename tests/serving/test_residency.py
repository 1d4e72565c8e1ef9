"""Modules brought in before anybody asks, and modules that stay whatever others need."""

import asyncio

import pytest
import torch

from runtime.errors import ModuleTooLarge
from tests.serving.helpers import add, held, outcome, until
from tests.tiny import TEXTS
from vbert.arena import Arena
from vbert.checkpoint import write_tenant
from vbert.errors import ConfigError, UnknownTenant, VbertError
from vbert.header import parse_header


@pytest.fixture
def sizes(backbone):
    arena = Arena(backbone.config, backbone.fingerprint, torch.float32, 2**20)
    return lambda module: arena.num_bytes(parse_header(write_tenant(module)))


@pytest.fixture
def modules(factory):
    return {f"t{i}": factory.tenant("lora") for i in range(6)}


async def add_all(engine, modules):
    for tenant, module in modules.items():
        await add(engine, tenant, module)


async def test_prefetched_tenants_are_hits(serving, modules):
    async with serving() as engine:
        await add_all(engine, modules)
        assert await engine.prefetch(modules) == dict.fromkeys(modules, True)
        assert engine.snapshot().resident_modules == len(modules)
        answers = await asyncio.gather(*[engine.classify(tenant, TEXTS) for tenant in modules])
        assert all(not answer.timings.load_s for answer in answers)
        with pytest.raises(UnknownTenant):
            await engine.prefetch(["nobody"])


async def test_prefetching_evicts_nothing(serving, modules, sizes):
    async with serving(module_budget_bytes=2 * sizes(modules["t0"])) as engine:
        await add_all(engine, modules)
        await engine.classify("t5", TEXTS)
        here = await engine.prefetch(modules)
        assert here["t5"]
        assert sum(here.values()) == 2
        snapshot = engine.snapshot()
        assert (snapshot.evictions, snapshot.resident_modules, snapshot.loads["no_room"]) == (0, 2, 4)
        assert sum(snapshot.resident_bytes.values()) == 2 * sizes(modules["t0"])
        cold = next(tenant for tenant, is_here in here.items() if not is_here)
        assert (await engine.classify(cold, TEXTS)).tenant == cold  # no room for a hint is no failure


async def test_a_request_takes_part_in_a_prefetch_that_runs(serving, modules):
    async with serving() as engine:
        await add_all(engine, modules)
        with held(engine._core.lanes.loader, 2) as release:
            hint = asyncio.create_task(engine.prefetch(["t0"]))
            await until(lambda: engine._core.manager._hinted)
            asked = asyncio.create_task(engine.classify("t0", TEXTS))
            await asyncio.sleep(0)
            release()
            assert await hint == {"t0": True}
            assert (await asked).timings.load_s > 0
        assert engine.snapshot().loads == {"ok": 1}


async def test_a_pinned_tenant_stays_and_its_new_version_comes_in(serving, modules, sizes):
    room = 3 * sizes(modules["t0"])
    async with serving(module_budget_bytes=room, pinned_tenants=("t0", "nobody"), canary_interval_s=0.05) as engine:
        await add_all(engine, modules)
        first = (await engine.get_tenant("t0")).digest
        await until(lambda: first in engine._core.manager.resident)
        for _ in range(3):
            for tenant in ("t1", "t2", "t3", "t4", "t5"):
                await engine.classify(tenant, TEXTS)
        assert first in engine._core.manager.resident
        assert engine.snapshot().evictions > 5
        await add(engine, "t0", modules["t1"])
        second = (await engine.get_tenant("t0")).digest
        await until(lambda: second in engine._core.manager.resident and second in engine._core.manager._held)


async def test_pins_leave_half_of_the_memory_to_the_others(serving, modules, sizes, factory):
    size = sizes(modules["t0"])
    big = factory.tenant("lora_all", "houlsby", "diff")
    room = sizes(big) + size // 2
    pins = tuple(modules)
    async with serving(module_budget_bytes=room, pinned_tenants=pins, canary_interval_s=0.05) as engine:
        await add_all(engine, modules)
        await add(engine, "big", big)
        await until(lambda: len(engine._core.manager._held) == min(len(pins), room // 2 // size))
        held_bytes = sum(engine._core.manager._held.values())
        assert held_bytes >= size
        with pytest.raises(ModuleTooLarge, match=f"pinned tenants hold {held_bytes}"):
            await engine.classify("big", TEXTS)
        assert (await engine.classify("t5", TEXTS)).tenant == "t5"
    assert held_bytes <= room // 2


def test_an_unknown_policy_is_refused_at_once(config):
    with pytest.raises(ConfigError, match="'mru' is unknown"):
        config(residency="mru")


@pytest.mark.parametrize("policy", ["lru", "lfu"])
async def test_every_policy_serves_more_tenants_than_fit(serving, modules, sizes, policy):
    async with serving(module_budget_bytes=2 * sizes(modules["t0"]), residency=policy) as engine:
        await add_all(engine, modules)
        answers = await asyncio.gather(*[engine.classify(tenant, TEXTS) for tenant in modules for _ in range(4)])
        assert [answer.tenant for answer in answers] == [tenant for tenant in modules for _ in range(4)]


async def test_the_backbone_needs_no_prefetch(serving):
    async with serving() as engine:
        assert await engine.prefetch([engine.name]) == {engine.name: True}
        assert (await engine.embed(engine.name, TEXTS)).tenant == engine.name
        assert engine.snapshot().loads == {}


async def test_prefetching_ends_with_the_engine(serving, modules):
    """No hint is left waiting for ever when the engine stops under it."""
    async with serving() as engine:
        await add_all(engine, modules)
        with held(engine._core.lanes.loader, 2) as release:
            hint = asyncio.create_task(outcome(engine.prefetch(modules)))
            await until(lambda: engine._core.manager._hinted)
            stop = asyncio.create_task(engine.stop())
            await asyncio.sleep(0.05)
            release()
            await stop
        async with asyncio.timeout(10):
            answer = await hint
    assert isinstance(answer, dict | VbertError)


async def test_an_unused_module_that_was_to_make_room_is_not_lost(serving, factory, sizes):
    """Retired beside a larger one that is in use, it goes at once: nobody may find it half gone for ever."""
    small, large, new = factory.tenant("lora"), factory.tenant("lora", "houlsby"), factory.tenant("lora_all")
    room = sizes(small) + sizes(large)
    async with serving(module_budget_bytes=room) as engine:
        for tenant, module in {"small": small, "large": large, "new": new}.items():
            await add(engine, tenant, module)
        await engine.classify("small", TEXTS)
        await engine.classify("large", TEXTS)
        assert sizes(small) < sizes(new)  # so that both must be chosen while `large` is in use
        with held(engine._core.lanes.compute) as release:
            running = asyncio.create_task(engine.classify("large", TEXTS))
            await until(lambda: any(entry.pins for entry in engine._core.manager._resident.values()))
            asked = asyncio.create_task(engine.classify("new", TEXTS))
            await until(lambda: engine.snapshot().loading_modules == 1)
            await asyncio.sleep(0.05)
            release()
            await asyncio.gather(running, asked)
        async with asyncio.timeout(10):
            assert (await engine.classify("small", TEXTS)).tenant == "small"
            assert not any(entry.leaving for entry in engine._core.manager._resident.values())
