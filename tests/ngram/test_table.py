"""The file of n-gram rows: what was written comes back, what is wrong with a file is said, nobody sees half of one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba.core.registry import CPUDispatcher

from vbert.errors import ConfigError, CorruptFile, ShapeError, WrongBackbone
from vbert.ngram import cache, index, table, views
from vbert.ngram.index import ngram_keys
from vbert.ngram.table import NgramTable, TableWriter

WIDTH = 12


@pytest.fixture
def keys():
    rng = np.random.default_rng(0)
    return np.unique(ngram_keys(rng.integers(0, 40, 600), np.arange(0, 601, 6)))


def rows_of(keys):
    torch.manual_seed(0)
    return torch.randn(len(keys), 3, WIDTH)


def write(path, keys, *, fingerprint="sha256:f", dtype=torch.float16, rows=None, batch=50):
    counts = np.arange(len(keys), 0, -1, dtype=np.uint32)
    rows = rows_of(keys) if rows is None else rows
    with TableWriter(path, fingerprint=fingerprint, keys=keys, counts=counts, width=WIDTH, dtype=dtype) as writer:
        for part in rows.split(batch):
            writer.add(part)
    return rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_damage_anywhere_is_found_by_who_reads_all(tmp_path, keys, dtype):
    path = tmp_path / "t"
    write(path, keys, dtype=dtype)
    NgramTable(path, None).check()
    data, begin = path.read_bytes(), 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for place in (begin, (begin + len(data)) // 2, len(data) - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CorruptFile, match="not as it was written"):
            NgramTable(path, None).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back(tmp_path, keys, dtype, out_dtype):
    rows = write(tmp_path / "t", keys, dtype=dtype)
    table = NgramTable(tmp_path / "t", "sha256:f")
    assert (len(table), table.width) == (len(keys), WIDTH)
    assert (table.keys == keys).all()
    assert table.counts.tolist() == list(range(len(keys), 0, -1))
    found, kept = table.look_up(keys[::-1].copy())
    assert (kept == 3).all()
    out = torch.empty(len(keys), 3, WIDTH, dtype=out_dtype)
    table.gather(found, out)
    near = {torch.float16: 2e-3, torch.int8: 2e-2}[dtype] + (2e-2 if out_dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(out.float(), rows.flip(0), rtol=0, atol=near)


def test_opening_reads_neither_index_nor_rows(tmp_path):
    """However large a table is, a server that opens it has none of it in memory."""
    keys = np.arange(1, 100_001, dtype=np.uint64) << np.uint64(21)
    write(tmp_path / "t", keys, batch=10_000)
    table = NgramTable(tmp_path / "t", "sha256:f")
    parts = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    (mine,) = [part for part in parts if str(table.path) in part]
    resident = int(re.search(r"Rss:\s+(\d+) kB", mine)[1]) * 1024
    assert 0 < resident < table.num_bytes / 20


def test_no_look_up_holds_the_lock_of_the_interpreter():
    kernels = [
        each
        for module in (cache, index, table, views)
        for each in vars(module).values()
        if isinstance(each, CPUDispatcher)
    ]
    inlined = [each for each in kernels if each.targetoptions.get("inline") == "always"]
    assert len(kernels) - len(inlined) >= 12
    assert all(each.targetoptions.get("nogil") for each in kernels)


def test_an_index_without_a_free_place_ends_the_search(tmp_path, keys):
    write(tmp_path / "t", keys)
    table = NgramTable(tmp_path / "t", "sha256:f")
    table._index[:, 0] = 1  # private memory, not the file
    assert (table.look_up(keys)[0] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_a_file_is_read_ahead_to_its_end_and_scales_before_rows(tmp_path, keys, dtype, monkeypatch):
    write(tmp_path / "t.ngrams", keys, dtype=dtype)
    table, pieces, done = NgramTable(tmp_path / "t.ngrams", None), [], 0

    def pread(descriptor, count, begin, pread=os.pread):
        pieces.append((begin, count))
        return pread(descriptor, count, begin)

    monkeypatch.setattr(os, "pread", pread)
    while count := table.read_ahead(done, 100):
        done += count
    assert done == table.num_bytes
    assert sorted(at for begin, count in pieces for at in range(begin, begin + count)) == list(range(done))
    scales = 0 if dtype == torch.float16 else 12 * len(keys)
    behind = [begin >= done - scales for begin, _ in pieces]
    if scales:
        first_row = done - scales - table.rows.nbytes
        assert all(begin < first_row for begin, _ in pieces[: behind.index(True)])
        assert behind.index(True) < [begin for begin, _ in pieces].index(first_row)


def test_rows_that_are_no_numbers_are_refused(tmp_path, keys):
    for bad, dtype in ((float("nan"), torch.int8), (1e6, torch.float16)):
        with pytest.raises(CorruptFile, match="not finite, or too large"):
            write(tmp_path / "t", keys[:2], rows=torch.full((2, 3, WIDTH), bad), dtype=dtype)


def test_a_row_that_is_not_there_is_left(tmp_path, keys):
    write(tmp_path / "t", keys)
    out = torch.full((2, 3, WIDTH), 7.0)
    NgramTable(tmp_path / "t", "sha256:f").gather(np.array([-1, 0]), out)
    assert (out[0] == 7).all()
    assert (out[1] != 7).all()
    for rows, room in ((np.array([0]), out), (np.array([0, len(keys)]), out)):
        with pytest.raises(ShapeError):
            NgramTable(tmp_path / "t", "sha256:f").gather(rows, room)
    NgramTable(tmp_path / "t", "sha256:f").gather(np.empty(0, np.int64), torch.empty(0, 3, WIDTH))


def test_a_table_without_entries(tmp_path):
    write(tmp_path / "t", np.empty(0, np.uint64))
    table = NgramTable(tmp_path / "t", "sha256:f")
    assert len(table) == len(table.keys) == 0
    assert table.look_up(np.array([5], np.uint64))[0].tolist() == [-1]


def test_it_is_a_safetensors_file(tmp_path, keys):
    from safetensors.torch import load_file

    rows = write(tmp_path / "t", keys)
    read = load_file(tmp_path / "t")
    assert torch.equal(read["rows"], rows.half())
    assert set(read) == {"index", "counts", "rows"}


def test_a_table_of_another_backbone_is_refused(tmp_path, keys):
    write(tmp_path / "t", keys)
    with pytest.raises(WrongBackbone, match=r"made by backbone sha256:f, this one is sha256:g; build it again"):
        NgramTable(tmp_path / "t", "sha256:g")


def test_a_truncated_or_altered_file_is_refused(tmp_path, keys):
    write(tmp_path / "t", keys, dtype=torch.int8)
    data = (tmp_path / "t").read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    cuts = [0, 5, 8, 8 + header_bytes // 2, 8 + header_bytes, len(data) // 2, len(data) - 1]
    for cut in cuts:
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(CorruptFile, match="build it again"):
            NgramTable(tmp_path / "cut", "sha256:f")
    header = json.loads(data[8 : 8 + header_bytes])
    for name, field, value in [
        ("index", "shape", [3, 2]),
        ("index", "shape", [0, 2]),
        ("index", "dtype", "F64"),
        ("rows", "dtype", "U64"),
        ("rows", "shape", [1, 3, WIDTH]),
        ("rows", "data_offsets", [0, 2**40]),
        ("scales", "shape", [-1, 3]),
        ("counts", "dtype", "F64"),
        ("__metadata__", "format", "other"),
    ]:
        changed = json.loads(json.dumps(header))
        changed[name][field] = value
        text = json.dumps(changed).encode()
        (tmp_path / "bad").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + header_bytes :])
        with pytest.raises(CorruptFile, match="damaged"):
            NgramTable(tmp_path / "bad", "sha256:f")


def test_an_index_that_points_beyond_the_rows_gives_none(tmp_path, keys):
    write(tmp_path / "t", keys)
    table = NgramTable(tmp_path / "t", "sha256:f")
    place = np.flatnonzero(table._index[:, 0] == keys[3])[0]
    table._index[place, 1] = len(keys)  # private memory, not the file
    with pytest.raises(CorruptFile, match="beyond its"):
        table.look_up(keys)
    with pytest.raises(CorruptFile, match="does not fit"):
        _ = table.keys
    assert NgramTable(tmp_path / "t", "sha256:f").look_up(keys)[0].tolist() == list(range(len(keys)))


def test_a_reader_keeps_its_version_while_the_next_is_published(tmp_path, keys):
    rows = write(tmp_path / "t", keys)
    old = NgramTable(tmp_path / "t", "sha256:f")
    write(tmp_path / "t", keys[:10], rows=torch.zeros(10, 3, WIDTH))
    out = torch.empty(len(keys), 3, WIDTH)
    old.gather(old.look_up(keys)[0], out)
    torch.testing.assert_close(out, rows, rtol=0, atol=2e-3)
    assert len(NgramTable(tmp_path / "t", "sha256:f")) == 10


def test_what_fails_leaves_the_file_of_that_name_and_nothing_else(tmp_path, keys):
    write(tmp_path / "t", keys)
    before = (tmp_path / "t").read_bytes()
    counts = np.ones(len(keys), np.uint32)
    make = {"fingerprint": "sha256:f", "keys": keys, "counts": counts, "width": WIDTH}
    with pytest.raises(ShapeError, match="are missing"), TableWriter(tmp_path / "t", **make) as writer:
        writer.add(torch.zeros(1, 3, WIDTH))
    with pytest.raises(ShapeError, match="do not fit"), TableWriter(tmp_path / "t", **make) as writer:
        writer.add(torch.zeros(len(keys) + 1, 3, WIDTH))
    with pytest.raises(RuntimeError, match="the encoder"), TableWriter(tmp_path / "t", **make):
        raise RuntimeError("the encoder failed")
    assert (tmp_path / "t").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".t.lock", "t"]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o600])
def test_a_table_has_the_permissions_of_other_files(tmp_path, keys, mode):
    """A server may run as another user than the one who builds."""
    before = os.umask(0o666 & ~mode)
    try:
        write(tmp_path / "t", keys)
    finally:
        os.umask(before)
    assert (tmp_path / "t").stat().st_mode & 0o777 == mode
    write(tmp_path / "t", keys)
    assert (tmp_path / "t").stat().st_mode & 0o777 == mode


def test_a_full_disk_leaves_the_old_file(tmp_path, keys):
    """A limit of this process plays the disk."""
    import resource
    import signal

    write(tmp_path / "t", keys[:2])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write(tmp_path / "t", keys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(NgramTable(tmp_path / "t", "sha256:f")) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [".t.lock", "t"]


def test_two_processes_do_not_write_one_file(tmp_path, keys):
    code = (
        "import fcntl, os, sys\n"
        f"lock = os.open({str(tmp_path / '.t.lock')!r}, os.O_CREAT | os.O_RDWR)\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\nprint('locked', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ConfigError, match="another process is writing"):
            write(tmp_path / "t", keys)
        other.stdin.close()
        other.wait()
    write(tmp_path / "t", keys)
    assert len(NgramTable(tmp_path / "t", "sha256:f")) == len(keys)
    assert os.listdir(tmp_path).count("t") == 1


def test_other_dtypes_are_refused(tmp_path, keys):
    with pytest.raises(ConfigError, match=r"float16 or int8, not torch\.float32"):
        write(tmp_path / "t", keys, dtype=torch.float32)
