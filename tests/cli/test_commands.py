"""The other commands, and `vbert` as a process: start-up, signals, pipes."""

import json
import os
import signal
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import cli
from runtime.store import TenantStore
from runtime.versions import ModuleFacts

ROOT = Path(__file__).parents[2]


def start(*arguments, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, **pipes, **options)


def test_help_imports_nothing_heavy():
    code = "import sys, cli; sys.argv = ['vbert', '--help']\ntry: cli.main()\nexcept SystemExit: print(*sys.modules)"
    out, err = start("-c", code).communicate(timeout=60)
    assert "serve the tenants of a store over HTTP" in out
    assert not {"torch", "numpy", "rich", "vbert", "runtime.engine", "asyncio"} & set(out.splitlines()[-1].split())
    assert err == ""


SPY = """
import os, sys, cli
class Spy:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.exit(os.environ["OMP_WAIT_POLICY"])
sys.meta_path.insert(0, Spy())
cli.main(["train", "--help"])
"""


def test_train_says_how_threads_wait_before_torch_is_loaded():
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    assert start("-c", SPY, env=env).communicate(timeout=60) == ("", "PASSIVE\n")


@pytest.mark.parametrize(
    "command", [(), ("serve",), ("tenants",), ("tenants", "add"), ("train",), ("profile",), ("bench",), ("keys",)]
)
def test_every_command_has_help(vbert, command):
    code, out, _ = vbert(*command, "--help")
    assert code == 0
    assert "usage: vbert" in out
    assert "VBERT_MAX_BATCH_TOKENS" in out


def test_every_option_of_the_server_is_a_flag(vbert):
    from runtime.config import EngineConfig
    from runtime.http.config import HttpConfig

    _, out, _ = vbert("serve", "--help")
    for config in (EngineConfig, HttpConfig):
        for name in config.__dataclass_fields__:
            assert "--" + name.replace("_", "-") in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve",), "--backbone is not given"),
        (("serve", "--backbone", "x"), "--store is not given"),
        (("serve", "--backbone", "x", "--store", "y", "--port", "http"), "invalid int value: 'http'"),
        (("serve", "--backbone", "x", "--store", "y", "--port", "99999"), "port is 99999"),
        (("serve", "--backbone", "x", "--store", "y", "--host", "0.0.0.0"), "no keys are set"),
        (("serve", "--backbone", "x", "--store", "y", "--dtype", "int4"), "dtype is 'int4'"),
        (("serve", "--frobnicate"), "unrecognized arguments: --frobnicate"),
        (("train", "t", "--out", "x"), "backbone is not set"),
        (("train", "--out", "x"), "backbone is not set"),
        (("train", "t", "--backbone", "x"), "the result has no place"),
        (("train", "--backbone", "x", "--store", "y"), "give NAME"),
        (("train", "--backbone", "x", "--store", "y", "--out", "z"), "give NAME"),
        (("train", "t", "--recipe", "/no/such.toml", "--out", "x"), "recipe /no/such.toml cannot be read"),
        (("profile",), "required: --backbone"),
        (("profile", "--backbone", "/no/such/folder"), "/no/such/folder"),
        (("bench", "frobnicate"), "benchmark 'frobnicate' is not one of"),
        (("keys", "a b"), "choose another"),
        (("keys", "a", "--scopes", "root"), "give some of infer, admin, metrics"),
        (("frobnicate",), "invalid choice: 'frobnicate'"),
        ((), "required: COMMAND"),
    ],
)
def test_wrong_command_lines(refused, arguments, message):
    assert message in refused(*arguments)


def test_a_variable_is_read_like_its_flag(refused, monkeypatch):
    monkeypatch.setenv("VBERT_MAX_BATCH_TOKENS", "many")
    assert "--max-batch-tokens: invalid int value: 'many'" in refused("serve", "--backbone", "x", "--store", "y")


def test_keys_go_hashed_into_a_private_file(ok, tmp_path):
    from runtime.http.auth import KeyRing

    file = tmp_path / "keys"
    made = [
        ok("keys", name, "--scopes", "infer,admin", "--tenants", "a.*,b", "--file", file, "--json") for name in "xy"
    ]
    ring = KeyRing.load(str(file))
    assert [ring.authenticate(f"Bearer {key['key']}").name for key in made] == ["x", "y"]
    assert made[0]["key"] not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_name_cannot_write_to_the_terminal(vbert):
    _, _, err = vbert("bench", "\x1b[31mred\n")
    assert "\x1b" not in err
    assert r"\x1b[31mred" in err


def test_an_interrupt_is_130(monkeypatch, vbert):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("commands.keys.show", interrupt)
    assert vbert("keys", "x") == (130, "", "")


def test_a_bug_shows_its_traceback(monkeypatch):
    monkeypatch.setattr("commands.keys.show", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["keys", "x"])


@pytest.mark.slow
def test_train_adds_what_it_trained(ok, tmp_path, backbone):
    rows = [{"text": f"{word} the cat sat", "label": word} for word in ("yes", "no")] * 8
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = ("--backbone", backbone.folder, "--train", tmp_path / "rows.jsonl", "--method", "head", "--epochs", 1)
    report = ok("train", *settings, "yesno", "--dev-share", 0.5, "--store", tmp_path / "store", "--json")
    assert (report["tenant"], report["version"], report["new"]) == ("yesno", 1, True)
    assert (report["labels"], report["path"]) == (["no", "yes"], None)
    ok("train", *settings, "--dev-share", 0.5, "--out", tmp_path / "out.safetensors")
    added = ok("tenants", "add", "again", tmp_path / "out.safetensors", "--backbone", backbone.folder, "--store",
               tmp_path / "store", "--json")  # fmt: skip
    assert added["digest"] == report["digest"]  # the same seed gives the same bytes


@pytest.mark.parametrize(("name", "message"), [("../x", "choose another name"), ("tiny-bert", "the backbone")])
def test_a_wrong_name_is_refused_before_training(refused, tmp_path, backbone, name, message):
    settings = ("--backbone", backbone.folder, "--train", "/no/such/rows.jsonl", "--store", tmp_path / "store")
    assert message in refused("train", name, *settings)


@pytest.mark.slow
def test_serve_until_sigterm(tmp_path, backbone, checkpoints, ok):
    flags = ("--store", tmp_path / "store", "--port", 0, "--json")
    ok("tenants", "add", "intent", checkpoints / "intent.safetensors", "--backbone", backbone.folder, *flags[:2])
    server = start("-m", "cli", "serve", *flags, env=os.environ | {"VBERT_BACKBONE": str(backbone.folder)})
    try:
        told = json.loads(server.stdout.readline())
        assert told["pid"] == server.pid
        body = json.dumps({"model": "intent", "input": "the cat"}).encode()
        request = urllib.request.Request(
            told["url"] + "/v1/classify", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.loads(answer.read())["model"] == "intent"
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=30)
        assert server.returncode == 0
    finally:
        server.kill()
        server.communicate()


@pytest.mark.slow
def test_a_closed_pipe_is_quiet(tmp_path):
    with TenantStore(tmp_path / "store") as store:
        facts = ModuleFacts(fingerprint="f", task="embed", labels=tuple(f"label {i}" for i in range(20_000)))
        store.put("t", b"x", facts)
    child = start("-m", "cli", "tenants", "show", "t", "--store", tmp_path / "store")
    assert child.stdout.read(6) == "tenant"
    child.stdout.close()
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait(timeout=30) == 141
