"""`vbert profile`, and what `vbert serve` makes of it; the restart that suits OpenMP to the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import wait_policy
from runtime.wait_policy import better_environment

ROOT = Path(__file__).parents[2]
TWO_CORES = "import os; os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))\n"
SPY = """
import os, sys, cli
class Spy:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.exit(f"{os.environ.get('OMP_WAIT_POLICY')} {os.getpid()} {sys.argv[1:]}")
sys.meta_path.insert(0, Spy())
cli.main()
"""


def spied(*arguments, code=TWO_CORES + SPY, **variables):
    """Process id, and what stderr says when torch is about to be loaded."""
    unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "VBERT_COMPUTE_THREADS")
    env = {name: value for name, value in os.environ.items() if name not in unset} | variables
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 1  # of sys.exit, also after the restart
    return process.pid, said.splitlines()


needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: nothing to wait for")


@needs_two_cores
@pytest.mark.parametrize(
    "arguments",
    [("serve", "--port", "0"), ("profile", "--backbone", "x"), ("serve", "--dtype", "x", "--max-batch-tokens", "y")],
)
def test_threads_wait_passively_before_torch_is_loaded(arguments):
    pid, said = spied(*arguments)
    is_wrong = "y" in arguments  # said by the whole parser, which comes later
    assert said[-1] == f"{None if is_wrong else 'PASSIVE'} {pid} {list(arguments)}"
    assert sum("starting again with OMP_WAIT_POLICY=PASSIVE" in line for line in said) == (not is_wrong)


@needs_two_cores
@pytest.mark.parametrize(
    ("arguments", "variables", "policy"),
    [
        ((), {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ((), {"GOMP_SPINCOUNT": "1000"}, None),
        (("--compute-threads", "1"), {}, None),
        ((), {"VBERT_COMPUTE_THREADS": "1"}, None),
    ],
)
def test_what_the_user_decided_stays(arguments, variables, policy):
    pid, said = spied("serve", *arguments, **variables)
    assert said == [f"{policy} {pid} {['serve', *arguments]}"]


def test_who_calls_main_keeps_the_process():
    code = TWO_CORES + SPY.replace("cli.main()", "cli.main(['serve'])")
    pid, said = spied(code=code)
    assert said == [f"None {pid} []"]


@pytest.mark.parametrize(
    ("threads", "cores", "is_set"),
    [
        (0, 1, False),
        (0, 2, True),
        (2, 2, True),
        (1, 2, False),
        (0, 4, True),
        (3, 4, False),
        (8, 4, True),
        (0, 8, False),
    ],
)
def test_when_threads_should_wait_passively(threads, cores, is_set):
    better = better_environment({"HOME": "/h"}, threads, cores)
    assert better == ({"HOME": "/h", "OMP_WAIT_POLICY": "PASSIVE"} if is_set else None)
    assert better_environment(better or {"OMP_WAIT_POLICY": "ACTIVE"}, threads, cores) is None


def test_flags_of_others_do_not_hide_those_of_the_engine(monkeypatch):
    """--host is no short form of --host-budget-bytes."""
    begun = []
    monkeypatch.setattr(wait_policy, "usable_cores", lambda: 2)
    monkeypatch.setattr(wait_policy, "restart_with", begun.append)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    wait_policy.suit_machine(["serve", "--host", "0.0.0.0", "--port", "80"])
    assert [environment["OMP_WAIT_POLICY"] for environment in begun] == ["PASSIVE"]
    wait_policy.suit_machine(["serve", "--host", "0.0.0.0", "--compute-threads", "1"])
    assert len(begun) == 1


@pytest.mark.slow
def test_a_profile_is_kept_where_serve_looks(ok, backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    report = ok("profile", "--backbone", backbone.folder, "--quick", "--json")
    path = Path(report["path"])
    assert path.parent == tmp_path / "cache" / "vbert"
    assert (report["layers"], report["hidden"], report["ffn"]) == (2, 32, 64)
    assert report["noise"] >= 0
    assert {name.split(" x")[0] for name in report["largest_ms"]} == set(json.loads(path.read_text())["curves"])
    elsewhere = ok("profile", "--backbone", backbone.folder, "--quick", "--out", tmp_path / "p.json")
    assert str(tmp_path / "p.json") in elsewhere
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written_is_refused_before_measuring(refused, backbone, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "p.json"
    assert "cannot be made" in refused("profile", "--backbone", backbone.folder, "--quick", "--out", out)
