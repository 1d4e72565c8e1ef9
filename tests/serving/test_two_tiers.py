"""Modules that come through host memory to a device: here a CPU plays the device, with the same streams and slots."""

import asyncio

import numpy as np
import pytest

from runtime.errors import ComputeFailed, ModuleTooLarge
from runtime.uploads import Uploads
from tests.random_tenants import DELTA_KINDS
from tests.serving.helpers import Dense, add, outcome, until
from tests.serving.test_faults import accounts
from tests.tiny import TEXTS

MIB = 2**20
TIERS = {"module_budget_bytes": MIB // 2, "host_budget_bytes": 4 * MIB}
CLOSE = {"rtol": 0, "atol": 1e-4}


async def quiet(engine):
    """Nothing is on its way, and nobody uses the host's copies."""
    manager = engine._core.manager
    host = manager.through.host
    await until(lambda: not manager.through._arriving and not host._users)
    assert host.num_bytes == sum(module.num_bytes for module in host._modules.values())
    assert sum(len(c.owners) for c in host.arena._classes.values()) == sum(
        len(module.slots) for module in host._modules.values()
    )
    return accounts(engine)


@pytest.mark.parametrize("lanes", [("rows", "modules", "compute"), ("modules",), ("none",)], ids="+".join)
async def test_every_kind_is_served_from_device_slots(serving, factory, backbone, lanes):
    modules = {f"t{i}": factory.tenant(DELTA_KINDS[i % len(DELTA_KINDS)]) for i in range(22)}
    dense = Dense(backbone)
    async with serving(**TIERS, lanes=lanes) as engine:
        for tenant, module in modules.items():
            await add(engine, tenant, module)
        for _ in range(2):
            answers = await asyncio.gather(*[engine.classify(tenant, TEXTS[:2]) for tenant in modules])
            for answer, module in zip(answers, modules.values(), strict=True):
                np.testing.assert_allclose(answer.probabilities, dense.probabilities(module, TEXTS[:2]), **CLOSE)
        now = await quiet(engine)
        arenas = engine._core.parts.arena, engine._core.parts.host_arena
        assert all(c.values.device.type == "cpu" for arena in arenas for c in arena._classes.values())
        assert now.resident_modules > 1


async def test_the_device_evicts_what_the_host_keeps(serving, factory):
    """Slots of one class for three modules: a module that comes back is not read from disk again."""
    modules = {f"t{i}": factory.tenant("lora") for i in range(60)}
    async with serving(module_budget_bytes=MIB // 4, host_budget_bytes=8 * MIB) as engine:
        for tenant, module in modules.items():
            await add(engine, tenant, module)
        for tenant in (*modules, *modules):
            assert (await engine.classify(tenant, TEXTS[:1])).tenant == tenant
        now = await quiet(engine)
        assert now.evictions > 10
        assert len(engine._core.manager.through.host._modules) == 60
        store = engine._core.parts.store
        for version in await engine.list_tenants():
            store.blob_path(version.digest).unlink()
        for tenant in modules:
            assert (await engine.classify(tenant, TEXTS[:1])).tenant == tenant


async def test_an_upload_that_fails_costs_its_tenant_only(serving, factory, monkeypatch):
    start = Uploads.start

    def broken(uploads, pieces, name=""):
        if name == bad:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return start(uploads, pieces, name)

    monkeypatch.setattr(Uploads, "start", broken)
    async with serving(**TIERS) as engine:
        await add(engine, "good", factory.tenant("lora"))
        await add(engine, "bad", factory.tenant("lora"))
        bad = (await engine.get_tenant("bad")).digest[:12]
        failed, good = await asyncio.gather(*[outcome(engine.classify(tenant, TEXTS)) for tenant in ("bad", "good")])
        assert isinstance(failed, ComputeFailed)
        assert "illegal memory access" in failed.message
        assert good.tenant == "good"
        assert (await quiet(engine)).resident_modules == 1


async def test_a_slot_larger_than_the_buffer_is_refused_by_name(serving, factory):
    async with serving(module_budget_bytes=200_000, host_budget_bytes=4 * MIB) as engine:
        await add(engine, "t", factory.tenant("lora"))
        with pytest.raises(ModuleTooLarge, match="the 200000 bytes of module_budget_bytes"):
            await engine.classify("t", TEXTS)
        await quiet(engine)


async def test_a_class_makes_way_for_another(serving, factory):
    """The buffer is full of slots of one size; a tenant of another size still gets in."""
    async with serving(module_budget_bytes=MIB // 2, host_budget_bytes=16 * MIB) as engine:
        for i in range(100):
            await add(engine, f"small{i}", factory.tenant("lora"))
            await engine.classify(f"small{i}", TEXTS[:1])
        before = engine.snapshot()
        await add(engine, "other", factory.tenant("houlsby"))
        assert (await engine.classify("other", TEXTS)).tenant == "other"
        assert (await engine.classify("small0", TEXTS)).tenant == "small0"
        assert (await quiet(engine)).evictions > before.evictions


async def test_a_prefetch_that_finds_no_room_on_the_device_reads_nothing(serving, factory):
    modules = {f"t{i}": factory.tenant("lora") for i in range(60)}
    async with serving(module_budget_bytes=MIB // 4, host_budget_bytes=8 * MIB) as engine:
        for tenant, module in modules.items():
            await add(engine, tenant, module)
        here = await engine.prefetch(modules)
        now = await quiet(engine)
        assert 0 < sum(here.values()) == now.resident_modules < 60
        assert (
            len(engine._core.manager.through.host._modules) <= now.resident_modules + 16
        )  # those on their way at once
