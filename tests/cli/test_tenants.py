"""`vbert tenants`, once on a store's folder and once on a running server: the same commands, the same answers."""

import pytest

from runtime.store import TenantStore
from tests.http.live import live
from vbert.checkpoint import read_tenant_bytes


@pytest.fixture(scope="module")
def server(tmp_path_factory, backbone):
    with live(tmp_path_factory.mktemp("live"), backbone.folder) as server:
        yield server


@pytest.fixture(params=["store", "server"])
def target(request, tmp_path):
    if request.param == "store":
        return "--store", tmp_path / "store"
    server = request.getfixturevalue("server")
    return "--server", server.url, "--key", server.key


def names(found):
    return [version["tenant"] for version in found]


@pytest.mark.slow
def test_the_life_of_a_tenant(ok, refused, target, backbone, checkpoints):
    add = ("tenants", "add", "demo", "--backbone", backbone.folder, *target, "--json")
    first = ok(*add, checkpoints / "intent.safetensors")
    assert (first["tenant"], first["version"], first["active"], first["new"]) == ("demo", 1, True, True)
    assert (first["task"], first["kinds"], len(first["labels"])) == ("classify", ["low_rank"], 3)
    assert (first["paths"], first["skip_fingerprint"]) == (["plain"], "")
    assert (first["exits"], first["exit_threshold"]) == ([], 1)
    assert ok(*add, checkpoints / "intent.safetensors")["new"] is False
    assert ok(*add, checkpoints / "vectors.safetensors", "--if-match", 1)["version"] == 2
    assert "has version 2, not version 1" in refused(*add, checkpoints / "intent.safetensors", "--if-match", 1)

    assert "demo" in names(ok("tenants", "list", *target, "--json"))
    assert ok("tenants", "show", "demo", *target, "--json")["task"] == "embed"
    assert [v["active"] for v in ok("tenants", "versions", "demo", *target, "--json")] == [False, True]
    assert ok("tenants", "activate", "demo", 1, *target, "--json")["version"] == 1
    assert "not version 2" in refused("tenants", "rollback", "demo", "--if-match", 2, *target)
    assert ok("tenants", "rollback", "demo", "--if-match", 1, *target, "--json")["version"] == 2
    assert "no version 9" in refused("tenants", "activate", "demo", 9, *target)
    assert "not version 1" in refused("tenants", "remove", "demo", "--if-match", 1, *target)
    assert ok("tenants", "remove", "demo", *target, "--json") == {"tenant": "demo", "removed": True}
    assert "no active tenant 'demo'" in refused("tenants", "show", "demo", *target)
    assert "demo" not in names(ok("tenants", "list", *target, "--json"))


@pytest.mark.slow
def test_a_peft_folder_is_converted_here(ok, target, backbone, checkpoints):
    found = ok("tenants", "add", "p", checkpoints / "peft", "--backbone", backbone.folder, *target, "--json")
    assert (found["task"], found["kinds"], found["source"]["method"]) == ("embed", ["low_rank"], "LORA")
    ok("tenants", "remove", "p", *target)


def test_the_stored_file_has_self_tests_of_the_original_library(ok, tmp_path, backbone, checkpoints):
    pytest.importorskip("peft")
    where = ("--backbone", backbone.folder, "--store", tmp_path / "store")
    found = ok("tenants", "add", "p", checkpoints / "peft", *where, "--json")
    with TenantStore(tmp_path / "store") as store:
        data = store.blob_path(found["digest"]).read_bytes()
    assert len(read_tenant_bytes(data).self_tests) == 3


def test_import_adds_what_it_can_and_names_the_rest(vbert, ok, tmp_path, backbone, checkpoints):
    add = ("tenants", "import", checkpoints, "--backbone", backbone.folder, "--store", tmp_path / "store")
    code, found, err = vbert(*add, "--json")
    assert code == 2
    assert err == "vbert: error: 3 of 6 checkpoints are refused\n"
    assert sorted(names(found["added"])) == ["intent", "peft", "vectors"]
    errors = {refusal["tenant"]: refusal["error"] for refusal in found["refused"]}
    assert "PREFIX_TUNING" in errors["prefix"]
    assert "choose another name" in errors["bad name"]
    assert errors.keys() == {"prefix", "bad name", "cut"}
    assert names(ok("tenants", "list", "--store", tmp_path / "store", "--json")) == ["intent", "peft", "vectors"]
    _, text, _ = vbert(*add)
    assert "PREFIX_TUNING" in text


def test_no_activate_stores_and_does_not_serve(ok, refused, tmp_path, backbone, checkpoints):
    where = ("--backbone", backbone.folder, "--store", tmp_path / "store")
    ok("tenants", "add", "t", checkpoints / "intent.safetensors", *where)
    ok("tenants", "add", "t", checkpoints / "vectors.safetensors", "--no-activate", *where)
    assert ok("tenants", "show", "t", "--store", tmp_path / "store", "--json")["version"] == 1
    ok("tenants", "activate", "t", 2, "--store", tmp_path / "store")
    assert ok("tenants", "show", "t", "--store", tmp_path / "store", "--json")["version"] == 2


def test_check_finds_a_damaged_file(ok, refused, tmp_path, backbone, checkpoints):
    where = ("--store", tmp_path / "store")
    added = ok(
        "tenants", "add", "t", checkpoints / "intent.safetensors", "--backbone", backbone.folder, *where, "--json"
    )
    assert ok("tenants", "check", *where, "--json")["blobs"] == 1
    with TenantStore(tmp_path / "store") as store:
        store.blob_path(added["digest"]).write_bytes(b"")
    assert "tenants t: blob" in refused("tenants", "check", *where)


def test_inspect_says_what_is_there_before_it_is_added(vbert, ok, backbone, checkpoints):
    report = ok("tenants", "inspect", checkpoints / "peft", "--backbone", backbone.folder, "--json")
    assert (report["format"], report["method"], report["refused"]) == ("peft", "LORA", [])
    assert (report["deltas"], report["head"]["kind"]) == ({"low_rank": 2}, "embed")
    assert "low_rank" in ok("tenants", "inspect", checkpoints / "intent.safetensors")
    code, report, err = vbert("tenants", "inspect", checkpoints / "prefix", "--json")
    assert (code, report["format"], len(report["refused"])) == (2, "peft", 1)
    assert err.startswith("vbert: error: peft_type PREFIX_TUNING is not served")
    code, report, _ = vbert("tenants", "inspect", checkpoints / "README.md", "--json")
    assert code == 2
    assert "README.md cannot be read" in report["refused"][0]


def test_inspect_refuses_the_task_that_add_would(vbert, backbone, checkpoints):
    command = ("tenants", "inspect", checkpoints / "peft", "--backbone", backbone.folder, "--json")
    assert vbert(*command, "--task", "embed")[0] == 0
    code, report, _ = vbert(*command, "--task", "classify")
    assert code == 2
    assert "FEATURE_EXTRACTION, not for classify" in report["refused"][0]


def test_tables_for_people(ok, tmp_path, backbone, checkpoints):
    where = ("--store", tmp_path / "store")
    ok("tenants", "add", "t", checkpoints / "intent.safetensors", "--backbone", backbone.folder, *where)
    header, row = ok("tenants", "list", *where).splitlines()
    assert header.split() == ["tenant", "version", "active", "task", "kinds", "bytes", "created"]
    assert row.split()[:5] == ["t", "1", "yes", "classify", "low_rank"]
    shown = dict(line.split(maxsplit=1) for line in ok("tenants", "show", "t", *where).splitlines())
    assert list(shown)[:4] == ["tenant", "version", "active", "task"]
    assert shown["fingerprint"] == backbone.fingerprint


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list",), "give --store DIR or --server URL, one of them"),
        (("list", "--store", "a", "--server", "b"), "not allowed with"),
        (("list", "--store", "/nowhere/at/all"), "there is no tenant store in /nowhere/at/all"),
        (("list", "--server", "127.0.0.1:1"), "is no address"),
        (("list", "--server", "file:///etc/passwd"), "is no address"),
        (("list", "--server", "http://127.0.0.1:1"), "no answer from http://127.0.0.1:1"),
        (("list", "--server", "http://127.0.0.1:1", "--key", "a\nb"), "the key has characters"),
        (("add", "t", "--backbone", "x", "--store", "y"), "required: FOLDER"),
        (("add", "t", "x", "--store", "y"), "required: --backbone"),
        (("import", "/no/such/folder", "--backbone", "x", "--store", "y"), "'/no/such/folder'; check the path"),
        (("activate", "t", "one", "--store", "y"), "invalid int value: 'one'"),
        ((), "required: COMMAND"),
        (("frobnicate",), "invalid choice"),
    ],
)
def test_wrong_command_lines(refused, arguments, message):
    assert message in refused("tenants", *arguments)


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("../x", "intent.safetensors", "choose another name"),
        ("tiny-bert", "intent.safetensors", "is the name of the backbone"),
        ("t", "missing", "missing does not exist"),
        ("t", "prefix", "PREFIX_TUNING"),
        ("t", "cut.safetensors", "bytes"),
    ],
)
def test_refused_checkpoints(refused, tmp_path, backbone, checkpoints, name, path, message):
    where = ("--backbone", backbone.folder, "--store", tmp_path / "store")
    assert message in refused("tenants", "add", name, checkpoints / path, *where)


@pytest.mark.slow
def test_what_the_server_says_is_told_with_its_code(refused, server, backbone, checkpoints):
    assert "answered 401 invalid_api_key" in refused("tenants", "list", "--server", server.url, "--key", "wrong")
    where = ("--server", server.url, "--key", server.key)
    assert "use --store" in refused(
        "tenants",
        "add",
        "t",
        checkpoints / "intent.safetensors",
        "--backbone",
        backbone.folder,
        "--no-activate",
        *where,
    )


@pytest.mark.slow
def test_the_environment_stands_in_for_flags(ok, monkeypatch, server, tmp_path, backbone, checkpoints):
    monkeypatch.setenv("VBERT_SERVER", server.url)
    monkeypatch.setenv("VBERT_KEY", server.key)
    monkeypatch.setenv("VBERT_BACKBONE", str(backbone.folder))
    assert "intent" in names(ok("tenants", "list", "--json"))
    # A flag goes before the variable of the other one.
    assert ok("tenants", "add", "t", checkpoints / "intent.safetensors", "--store", tmp_path / "s", "--json")["new"]
