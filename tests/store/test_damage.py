"""Full disks, damaged files, garbage and permissions: nothing half written, nothing lost, a clear error each."""

import os
import resource
import sqlite3
import stat

import pytest

from runtime.blobs import digest_of
from runtime.catalogue import explained
from runtime.errors import StoreFull
from runtime.store import TenantStore
from runtime.versions import ModuleFacts, Upload
from vbert.errors import ConfigError, CorruptFile, Overloaded

FACTS = ModuleFacts(fingerprint="sha256:0", task="embed")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(folder):
    with TenantStore(folder) as store:
        yield store


def blob_files(folder):
    return sorted(path.stem for path in folder.glob("blobs/*/*"))


# ---- limits: nothing half written ------------------------------------------------------------------------------------


def test_max_bytes_refuses_the_whole_batch(folder):
    with TenantStore(folder, max_bytes=10) as store:
        store.put("t", b"12345", FACTS)
        uploads = [Upload(tenant="u", data=b"abcd", facts=FACTS), Upload(tenant="v", data=b"efgh", facts=FACTS)]
        with pytest.raises(StoreFull, match="would hold 13 bytes, its limit is 10"):
            store.put_many(uploads)
        assert [v.tenant for v in store.list()] == ["t"]
        assert blob_files(folder) == [digest_of(b"12345")]
        store.put("t", b"12345", FACTS)  # no new bytes: always accepted
        store.remove("t")
        with pytest.raises(StoreFull):
            store.put("u", b"123456", FACTS)
        store.collect_garbage(store.garbage())
        assert store.put("u", b"123456", FACTS)[1]
        assert store.num_bytes() == 6


def test_a_file_size_limit_is_store_full_and_leaves_nothing(store, folder):
    store.put("t", b"one", FACTS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(StoreFull, match="cannot grow: File too large"):
            store.put("t", bytes(300_000), FACTS)
        with pytest.raises(StoreFull, match="cannot grow"):  # here it is the catalogue's log that hits the limit
            store.put("u", b"two", ModuleFacts(fingerprint="f", task="embed", source={"long": "x" * 300_000}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [v.tenant for v in store.list()] == ["t"]
    assert not list(folder.glob("incoming/*"))
    assert blob_files(folder) == [digest_of(b"one")]
    assert store.put("t", b"two", FACTS)[0].version == 2
    assert store.check() == 2  # and works again


# ---- blobs and garbage -----------------------------------------------------------------------------------------------


def test_garbage_is_kept_while_somebody_uses_it(store, folder):
    old, _ = store.put("t", b"one", FACTS)
    store.remove("t")
    garbage = store.garbage()
    assert garbage == {old.digest}
    assert store.collect_garbage(frozenset()) == ()
    with TenantStore(folder):
        assert store.collect_garbage(garbage) == ()  # the other one may be about to read it
    assert blob_files(folder) == [old.digest]
    assert store.collect_garbage(garbage) == (old.digest,)
    assert blob_files(folder) == []


def test_what_is_named_again_is_no_garbage_any_more(store, folder):
    old, _ = store.put("t", b"one", FACTS)
    store.remove("t")
    garbage = store.garbage()
    new, _ = store.put("u", b"one", FACTS)
    assert store.collect_garbage(garbage) == ()
    assert blob_files(folder) == [old.digest] == [new.digest]
    store.check()


def test_opening_cleans_up_what_a_kill_left(folder):
    with TenantStore(folder) as store:
        store.put("t", b"one", FACTS)
    orphan = folder / "blobs" / "ab" / f"{'ab' * 32}.safetensors"
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"never committed")
    (folder / "incoming" / "x.part").write_bytes(b"half")
    (folder / "blobs" / "ab" / "notes.txt").write_text("not ours")
    with TenantStore(folder) as store:
        assert store.check() == 1
    assert not orphan.exists()
    assert not list(folder.glob("incoming/*"))
    assert (folder / "blobs" / "ab" / "notes.txt").exists()


def test_sending_again_repairs_a_damaged_blob(store):
    version, _ = store.put("t", b"one", FACTS)
    store.blob_path(version.digest).write_bytes(b"0ne")
    with pytest.raises(CorruptFile, match=r"1 of 1 blobs are damaged: tenants t: .*does not match"):
        store.check()
    assert store.put("t", b"one", FACTS) == (version, False)
    assert store.check() == 1


def test_check_names_every_damaged_tenant(store):
    for tenant in ("a", "b", "c"):
        store.put(tenant, tenant.encode(), FACTS)
    store.blob_path(store.resolve("a").digest).unlink()
    store.blob_path(store.resolve("c").digest).write_bytes(b"")
    seen = []
    with pytest.raises(CorruptFile, match="2 of 3") as caught:
        store.check(lambda done, total: seen.append((done, total)))
    assert "tenants a: blob" in str(caught.value)
    assert "tenants c: blob" in str(caught.value)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_self_tests_live_as_long_as_their_blob(store):
    version, _ = store.put("t", b"one", FACTS)
    assert store.self_tests(version.digest) is None
    store.set_self_tests(version.digest, b"tests")
    store.set_self_tests(version.digest, b"better tests")
    assert store.self_tests(version.digest) == b"better tests"
    store.remove("t")
    store.collect_garbage(store.garbage())
    store.set_self_tests(version.digest, b"too late")
    assert store.self_tests(version.digest) is None


def test_everything_is_private(folder):
    umask = os.umask(0)
    try:
        with TenantStore(folder) as store:
            store.put("t", b"one", FACTS)
            modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    finally:
        os.umask(umask)
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    assert any(path.name == "catalogue.sqlite-wal" for path in modes)


# ---- opening what is not a good store --------------------------------------------------------------------------------


def test_reading_a_store_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match="there is no tenant store in"):
        TenantStore(tmp_path / "typo", create=False)
    assert not (tmp_path / "typo").exists()


def test_a_catalogue_that_is_no_database(folder):
    TenantStore(folder).close()
    (folder / "catalogue.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(CorruptFile, match=r"is damaged: file is not a database; restore it"):
        TenantStore(folder)


def test_a_catalogue_that_cannot_be_opened(folder):
    (folder / "catalogue.sqlite").mkdir(parents=True)
    with pytest.raises(ConfigError, match="unable to open database file; check the permissions"):
        TenantStore(folder)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (sqlite3.SQLITE_IOERR_READ, ConfigError),
        (sqlite3.SQLITE_IOERR_WRITE, StoreFull),
        (sqlite3.SQLITE_READONLY_DBMOVED, ConfigError),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, Overloaded),
        (sqlite3.SQLITE_CORRUPT_INDEX, CorruptFile),
    ],
)
def test_what_sqlite_says_is_one_of_our_errors(tmp_path, code, expected):
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = code
    assert type(explained(tmp_path / "catalogue.sqlite", error)) is expected


def test_another_database_in_its_place(folder):
    TenantStore(folder).close()
    (folder / "catalogue.sqlite").unlink()
    sqlite3.connect(folder / "catalogue.sqlite").execute("CREATE TABLE x (y)").connection.close()
    with pytest.raises(CorruptFile, match="not a vbert catalogue"):
        TenantStore(folder)


def test_a_newer_schema_is_refused_by_number(folder):
    TenantStore(folder).close()
    sqlite3.connect(folder / "catalogue.sqlite").execute("PRAGMA user_version = 7").connection.close()
    with pytest.raises(ConfigError, match="schema version 7, this vbert reads 1"):
        TenantStore(folder)


def test_a_lost_catalogue_never_costs_the_blobs(folder):
    with TenantStore(folder) as store:
        version, _ = store.put("t", b"one", FACTS)
    (folder / "catalogue.sqlite").unlink()
    with pytest.raises(CorruptFile, match="is missing but there are blobs"):
        TenantStore(folder)
    assert blob_files(folder) == [version.digest]


def test_a_damaged_page_is_found(folder):
    with TenantStore(folder) as store:
        store.put_many([Upload(tenant=f"t{i}", data=b"same", facts=FACTS) for i in range(100)])
    path = folder / "catalogue.sqlite"
    data = bytearray(path.read_bytes())
    data[8192:] = b"\xff" * (len(data) - 8192)
    path.write_bytes(data)
    with pytest.raises(CorruptFile, match="is damaged"), TenantStore(folder) as store:
        store.check()
