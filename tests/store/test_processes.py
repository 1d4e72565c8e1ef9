"""The store between processes: kill -9 at random points, two writers at once, commits seen at once."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.store import TenantStore
from runtime.versions import ModuleFacts

ROOT = Path(__file__).parents[2]
FACTS = ModuleFacts(fingerprint="sha256:0", task="embed")


def start(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    chance, acknowledged = random.Random(0), {}
    for round_idx in range(10):
        child = start(ROOT / "tests/store/put_forever.py", tmp_path / "store", round_idx)
        assert child.stdout.readline() == "open\n"
        time.sleep(chance.uniform(0, 0.2))  # the only way to die at a random point
        child.kill()
        for line in child.stdout.read().splitlines():
            tenant, version, digest = line.split()
            acknowledged[tenant, int(version)] = digest
        child.stdout.close()
        child.wait()
        with TenantStore(tmp_path / "store") as store:  # cleans up
            stored = {(v.tenant, v.version): v.digest for t in store.list() for v in store.versions(t.tenant)}
            assert acknowledged.items() <= stored.items()
            assert len(stored) - len(acknowledged) <= round_idx + 1  # committed, and killed before it could say so
            assert store.check() == len(stored)
        files = sorted(path.stem for path in (tmp_path / "store").glob("blobs/*/*"))
        assert files == sorted(stored.values())
        assert not list((tmp_path / "store" / "incoming").iterdir())
    assert len(acknowledged) > 20


WRITER = """
import sys
from runtime.store import TenantStore
from runtime.versions import ModuleFacts
folder, me = sys.argv[1:]
facts = ModuleFacts(fingerprint="sha256:0", task="embed")
with TenantStore(folder) as store:
    for i in range(20):
        store.put("shared", f"{me} {i}".encode(), facts)
        store.put(f"own-{me}-{i}", b"same bytes", facts)
"""


@pytest.mark.slow
def test_two_processes_create_and_write_one_store(tmp_path):
    children = [start("-c", WRITER, tmp_path / "store", me) for me in range(2)]
    assert [child.communicate(timeout=60) and child.returncode for child in children] == [0, 0]
    with TenantStore(tmp_path / "store") as store:
        assert [v.version for v in store.versions("shared")] == list(range(1, 41))
        assert len(store.list()) == 41
        assert store.check() == 41


def test_commits_of_another_handle_are_seen_at_once(tmp_path):
    with TenantStore(tmp_path / "store") as ours, TenantStore(tmp_path / "store") as theirs:
        for i in range(5):
            theirs.put("t", b"%d" % i, FACTS)
            assert ours.resolve("t").version == i + 1
        theirs.rollback("t")
        assert ours.resolve("t").version == 4
