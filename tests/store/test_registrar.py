"""Tenants that arrive together share a commit; one that is refused costs the others nothing; nothing is left open."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from runtime.errors import Draining, VersionConflict
from runtime.registrar import Registrar
from runtime.store import TenantStore
from runtime.versions import ModuleFacts, Upload

FACTS = ModuleFacts(fingerprint="sha256:0", task="embed")


def upload(tenant, data=b"x", **options):
    return Upload(tenant=tenant, data=data, facts=FACTS, **options)


@pytest.fixture
def lane():
    with ThreadPoolExecutor(1) as lane:
        yield lane


@pytest.fixture
def store(tmp_path):
    """A store that counts its commits and begins them when `gate` is set."""
    with TenantStore(tmp_path / "store") as store:
        store.groups, store.gate = [], threading.Event()
        put_many = store.put_many

        def counted(uploads):
            store.gate.wait(10)
            store.groups.append([each.tenant for each in uploads])
            return put_many(uploads)

        store.put_many = counted
        yield store


async def together(registrar, store, uploads):
    tasks = [asyncio.create_task(registrar.put(each)) for each in uploads]
    await asyncio.sleep(0)
    store.gate.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_those_that_wait_share_a_commit(store, lane):
    uploads = [upload(f"t{i}", bytes([i])) for i in range(70)]
    results = await together(Registrar(store, lane), store, uploads)
    assert [(version.tenant, version.version, created) for version, created in results] == [
        (f"t{i}", 1, True) for i in range(70)
    ]
    assert [len(group) for group in store.groups] == [1, 64, 5]
    for i, (version, _) in enumerate(results):
        assert store.blob_path(version.digest).read_bytes() == bytes([i])


async def test_a_refused_one_costs_the_others_nothing(store, lane):
    registrar = Registrar(store, lane)
    uploads = [upload("first"), upload("a"), upload("b", if_match=7), upload("c")]
    _, a, b, c = await together(registrar, store, uploads)
    assert isinstance(b, VersionConflict)
    assert a[1]
    assert c[1]
    assert [v.tenant for v in store.list()] == ["a", "c", "first"]


async def test_versions_of_one_tenant_keep_their_order(store, lane):
    uploads = [upload("t", bytes([i])) for i in range(5)]
    results = await together(Registrar(store, lane), store, uploads)
    assert [version.version for version, _ in results] == [1, 2, 3, 4, 5]
    assert store.get("t").version == 5


async def test_a_caller_that_leaves_holds_nobody_up(store, lane):
    registrar = Registrar(store, lane)
    tasks = [asyncio.create_task(registrar.put(upload(name))) for name in ("a", "b", "c")]
    await asyncio.sleep(0)
    tasks[1].cancel()
    store.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[1], asyncio.CancelledError)
    assert [results[i][0].tenant for i in (0, 2)] == ["a", "c"]


async def test_a_closed_lane_refuses_those_that_wait(store):
    lane = ThreadPoolExecutor(1)
    registrar = Registrar(store, lane)
    tasks = [asyncio.create_task(registrar.put(upload(name))) for name in ("begun", "late")]
    await asyncio.sleep(0)
    lane.shutdown(wait=False)
    store.gate.set()
    begun, late = await asyncio.gather(*tasks, return_exceptions=True)
    assert begun[0].tenant == "begun"
    assert isinstance(late, Draining)
    with pytest.raises(Draining):
        await registrar.put(upload("later"))


async def test_what_is_no_refusal_reaches_the_caller(store, lane):
    def broken(uploads):
        raise RuntimeError("a bug")

    store.put_many = broken
    with pytest.raises(RuntimeError, match="a bug"):
        await Registrar(store, lane).put(upload("t"))
