"""The store's laws in one process: versions, rollback, preconditions, ids, threads."""

import json
import threading

import pytest

from runtime.blobs import digest_of
from runtime.errors import InvalidTenantId, VersionConflict
from runtime.store import TenantStore, check_tenant_id
from runtime.versions import ModuleFacts, Upload
from vbert.errors import BadRequest, UnknownTenant

FACTS = ModuleFacts(
    fingerprint="sha256:0", task="classify", labels=("no", "yes"), max_length=64, kinds=("low_rank",), source={"a": [1]}
)


@pytest.fixture
def store(tmp_path):
    with TenantStore(tmp_path / "store") as store:
        yield store


# ---- versions --------------------------------------------------------------------------------------------------------


def test_put_then_resolve_gives_the_facts_back(store):
    version, created = store.put("acme.intent", b"one", FACTS)
    assert created
    assert (version.version, version.digest, version.num_bytes, version.active) == (1, digest_of(b"one"), 3, True)
    assert (version.task, version.labels, version.max_length) == ("classify", ("no", "yes"), 64)
    assert (version.kinds, version.source, version.fingerprint) == (("low_rank",), {"a": [1]}, "sha256:0")
    assert 1.7e9 < version.created_s < 5e9
    assert store.resolve("acme.intent") == store.get("acme.intent") == version
    assert store.blob_path(version.digest).read_bytes() == b"one"


def test_versions_count_up_and_the_newest_is_active(store):
    for data in (b"one", b"two", b"three"):
        store.put("t", data, FACTS)
    assert [(v.version, v.active) for v in store.versions("t")] == [(1, False), (2, False), (3, True)]


def test_identical_bytes_make_no_new_version(store):
    first, _ = store.put("t", b"one", FACTS)
    assert store.put("t", b"one", FACTS) == (first, False)
    assert len(store.versions("t")) == 1


def test_bytes_of_an_older_version_activate_it_again(store):
    store.put("t", b"one", FACTS)
    store.put("t", b"two", FACTS)
    version, created = store.put("t", b"one", FACTS)
    assert (version.version, version.active, created) == (1, True, False)
    assert store.rollback("t").version == 2


def test_put_without_activation_changes_no_answer(store):
    store.put("t", b"one", FACTS)
    version, created = store.put("t", b"two", FACTS, activate=False)
    assert (version.version, version.active, created) == (2, False, True)
    assert store.resolve("t").version == 1
    assert store.put("t", b"two", FACTS, activate=False) == (version, False)


def test_a_tenant_that_was_never_activated_is_unknown_but_has_versions(store):
    store.put("t", b"one", FACTS, activate=False)
    with pytest.raises(UnknownTenant, match="no active tenant 't'"):
        store.resolve("t")
    assert store.list() == []
    assert [v.active for v in store.versions("t")] == [False]
    assert store.activate("t", 1).active


def test_rollback_walks_back_through_what_was_active(store):
    for data in (b"one", b"two", b"three"):
        store.put("t", data, FACTS)
    store.activate("t", 1)
    assert [store.rollback("t").version for _ in range(3)] == [3, 2, 1]
    with pytest.raises(BadRequest, match="no version before 1"):
        store.rollback("t")
    with pytest.raises(UnknownTenant):
        store.rollback("nobody")


def test_numbers_are_never_reused(store):
    store.put("t", b"one", FACTS)
    store.put("t", b"two", FACTS)
    store.remove("t")
    version, created = store.put("t", b"one", FACTS)
    assert (version.version, created) == (3, True)
    with pytest.raises(BadRequest, match="no version before 3"):
        store.rollback("t")


def test_remove_forgets_the_tenant_only(store):
    store.put("t", b"one", FACTS)
    store.put("u", b"one", FACTS)
    store.remove("t")
    for missing in (store.resolve, store.versions, store.remove):
        with pytest.raises(UnknownTenant):
            missing("t")
    assert store.garbage() == set()
    assert store.blob_path(store.resolve("u").digest).is_file()


@pytest.mark.parametrize("version", [0, 2, -1, 2**40])
def test_activate_an_unknown_version(store, version):
    store.put("t", b"one", FACTS)
    with pytest.raises(UnknownTenant, match=f"no version {version}"):
        store.activate("t", version)


def test_list_pages_by_id(store):
    store.put_many([Upload(tenant=f"t{i:02}", data=b"same", facts=FACTS) for i in range(25)])
    pages, after = [], ""
    while page := store.list(after, 10):
        pages.append([v.tenant for v in page])
        after = page[-1].tenant
    assert [len(page) for page in pages] == [10, 10, 5]
    assert [tenant for page in pages for tenant in page] == [f"t{i:02}" for i in range(25)]


# ---- preconditions ---------------------------------------------------------------------------------------------------


def test_if_match_names_the_active_version(store):
    store.put("t", b"one", FACTS, if_match=0)
    store.put("t", b"two", FACTS, if_match=1)
    for conflicting in (
        lambda: store.put("t", b"three", FACTS, if_match=1),
        lambda: store.put("t", b"two", FACTS, if_match=0),
        lambda: store.activate("t", 1, if_match=1),
        lambda: store.rollback("t", if_match=1),
        lambda: store.remove("t", if_match=1),
    ):
        with pytest.raises(VersionConflict, match="has version 2, not version"):
            conflicting()
    assert store.resolve("t").version == 2
    with pytest.raises(VersionConflict, match="no active version"):
        store.put("u", b"one", FACTS, if_match=1)
    store.remove("t", if_match=2)


@pytest.mark.parametrize("tenant", ["a", "A9", "acme.intent", "a" * 128, "0-_."])
def test_good_ids(tenant):
    assert check_tenant_id(tenant) == tenant


BAD_IDS = ["", ".", "..", "../x", "a/b", "a\\b", "-a", "_a", "a b", "a\n", "a\0", "é", "\ud800", "a" * 129, "%2e%2e"]


@pytest.mark.parametrize("tenant", BAD_IDS)
def test_bad_ids_are_refused_and_unknown(store, tenant):
    with pytest.raises(InvalidTenantId, match="choose another name"):
        store.put(tenant, b"one", FACTS)
    for read in (store.resolve, store.versions):
        with pytest.raises(UnknownTenant):
            read(tenant)


def test_facts_survive_json(store):
    facts = ModuleFacts(fingerprint="f", task="embed", labels=("ü", "\u2028"), source={"x": {"y": [None, 1.5, True]}})
    assert store.put("t", b"one", facts)[0].source == json.loads(json.dumps(facts.source))
    assert store.resolve("t").labels == facts.labels


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_threads_share_one_store(store):
    failures = []

    def work(me):
        try:
            for i in range(10):
                version, _ = store.put("shared", b"%d %d" % (me, i), FACTS)
                assert store.versions("shared")[version.version - 1].digest == version.digest
                assert store.resolve("shared").version >= version.version
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [v.version for v in store.versions("shared")] == list(range(1, 41))


def test_a_file_is_never_deleted_under_a_put(store):
    """One thread adds and removes the same bytes, the other deletes what it saw as garbage."""
    over = threading.Event()

    def collect():
        while not over.is_set():
            store.collect_garbage(store.garbage())

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        for _ in range(50):
            version, _ = store.put("t", b"one", FACTS)
            assert store.blob_path(version.digest).is_file()
            assert store.check() == 1
            store.remove("t")
    finally:
        over.set()
        thread.join()
