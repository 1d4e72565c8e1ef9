"""A file of n-gram representations: mapped, not read, so that opening takes no time, and memory only popular rows.

It is a safetensors file: `index` [C, 2] (vbert/ngram/index.py), `counts` [N] (how often each n-gram was seen, for
pruning and merging), `rows` [N, 3, H] float16, or int8 with `scales` [N, 3]; the most frequent n-grams first. Its
header has the fingerprint of the skip backbone that made the rows, and a digest of all that follows it. A file never
changes: a new version takes its name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import mmap
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vbert.errors import ConfigError, CorruptFile, ShapeError, WrongBackbone
from vbert.kernels.rows import as_rows, load, store
from vbert.memory import mapped
from vbert.ngram.index import Keys, Located, Rows, build_index, look_up
from vbert.ngram.views import add_views

__all__ = ["NgramTable", "TableWriter"]

_FORMAT = "vbert.ngrams.1"
_MAX_HEADER_BYTES = 1 << 16
_DTYPES = {"F16": torch.float16, "I8": torch.int8, "F32": torch.float32, "U64": torch.uint64, "U32": torch.uint32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ROW_DTYPES = (torch.float16, torch.int8)
_AGAIN = "build it again"
_DIGEST = 32  # bytes


class NgramTable:
    """Entries of one file. Any thread may read; the GIL is released meanwhile."""

    def __init__(self, path: str | os.PathLike[str], fingerprint: str | None) -> None:
        """fingerprint: of the backbone that must have made it; None: any. Raises OSError; CorruptFile for a file that
        is cut or no table; WrongBackbone."""
        self.path = Path(path)
        if self.path.is_dir():
            raise ConfigError(f"{path} is a folder; give the file of an n-gram table")
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                memory = mapped(file)
            except ValueError as error:  # an empty file
                raise CorruptFile(f"the n-gram table {path} is empty; {_AGAIN}") from error
        memory.madvise(mmap.MADV_RANDOM)
        about, tensors = _parse(memory, size, self.path)
        self.fingerprint, self._digest = about.pop("fingerprint"), about.pop("digest", "")
        self.about = {name: value for name, value in about.items() if name != "format"}
        if fingerprint is not None:
            self.check_made_by(fingerprint)
        self._index: Keys = tensors["index"].numpy()
        self.counts, self.rows, self._scales = tensors["counts"], tensors["rows"], tensors.get("scales")
        scale_bytes = 0 if self._scales is None else self._scales.nbytes
        first_row = size - scale_bytes - self.rows.nbytes
        self._in_order = (0, first_row), (size - scale_bytes, scale_bytes), (first_row, self.rows.nbytes)

    def __len__(self) -> int:
        return len(self.rows)

    def check_made_by(self, fingerprint: str) -> None:
        """Raises WrongBackbone."""
        if self.fingerprint != fingerprint:
            raise WrongBackbone(
                f"the n-gram table {self.path} was made by backbone {self.fingerprint[:23]}, this one is "
                f"{fingerprint[:23]}; {_AGAIN} with this one"
            )

    def check(self) -> None:
        """Read everything, as the server never does. Raises OSError, CorruptFile for whatever is not as it was
        written."""
        with self.path.open("rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            found = _digest_of(file)
        if found != self._digest:
            raise CorruptFile(f"the n-gram table {self.path} is not as it was written; {_AGAIN}")

    @property
    def encoder(self) -> str:
        """Fingerprint of the local layers that made the rows: the skip backbone's, or adapted to a domain."""
        return str(self.about.get("encoder", self.fingerprint))

    @property
    def width(self) -> int:
        return self.rows.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return self.path.stat().st_size

    def read_ahead(self, begin: int, count: int) -> int:
        """Have the system read a part of the file into its page cache; returns how many bytes, at most `count`, and 0
        at the end. A row that is not there costs whoever asks for it a read of the disk, some 100 us. `begin` counts
        the scales before the rows, since every row needs its own. Raises OSError."""
        with self.path.open("rb", buffering=0) as file:
            for at, size in self._in_order:
                if begin < size:
                    return len(os.pread(file.fileno(), min(count, size - begin), at + begin))
                begin -= size
        return 0

    @property
    def keys(self) -> Keys:
        """[N] of all entries, in the order of their rows. Reads the whole index. Raises CorruptFile."""
        taken = self._index[self._index[:, 0] != 0]
        if len(taken) != len(self) or (np.sort(taken[:, 1]) != np.arange(len(self))).any():
            raise CorruptFile(f"the index of {self.path} does not fit its {len(self)} rows; {_AGAIN}")
        keys = np.empty(len(self), np.uint64)
        keys[taken[:, 1].astype(np.int64)] = taken[:, 0]
        return keys

    def look_up(self, keys: Keys, depth: int = 3) -> tuple[Rows, NDArray[np.uint8]]:
        """As vbert.ngram.index.look_up. Raises CorruptFile rather than give a row that is not there."""
        rows, kept = look_up(keys, self._index, depth)
        if len(rows) and int(rows.max()) >= len(self):
            raise CorruptFile(f"the index of {self.path} names a row beyond its {len(self)}; {_AGAIN}")
        return rows, kept

    def fill(self, located: Located, asking: NDArray[np.bool_], length: int, source: int) -> None:
        """As vbert.ngram.index.Located.fill. Raises CorruptFile as `look_up` does."""
        if located.fill(asking, length, source, self._index) >= len(self):
            raise CorruptFile(f"the index of {self.path} names a row beyond its {len(self)}; {_AGAIN}")

    def add_views(self, rows: Rows, cu_seqlens: NDArray[np.int64], out: Tensor) -> None:
        """As vbert.ngram.views.add_views."""
        add_views(self.rows, rows, cu_seqlens, out=out, scales=self._scales)

    def gather(self, rows: Rows, out: Tensor) -> None:
        """Fill out [n, 3, H], float32 or bfloat16 in host memory; what has row -1 is left. Raises ShapeError."""
        if out.shape != (len(rows), 3, self.width) or not out.is_contiguous():
            raise ShapeError(f"{len(rows)} rows [3, {self.width}] do not fit {list(out.shape)}")
        if len(rows) and int(rows.max()) >= len(self):
            raise ShapeError(f"row {int(rows.max())} is beyond the {len(self)} of {self.path}")
        flat, _ = as_rows(out.view(len(rows), 3 * self.width))
        if self._scales is None:
            _gather_half(self.rows.view(torch.int16).numpy().reshape(-1), rows, flat, 3 * self.width)
        else:
            _gather_scaled(self.rows.numpy().reshape(-1), self._scales.numpy().reshape(-1), rows, flat, self.width)


class TableWriter:
    """Writes a table row by row, under its name at once when all are there, or not at all.

    `with TableWriter(...) as writer: writer.add(rows)`. One process at a time makes the file of a name.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fingerprint: str,
        keys: Keys,
        counts: NDArray[np.int64],
        width: int,
        dtype: torch.dtype = torch.float16,
        about: Mapping[str, str] | None = None,
    ) -> None:
        """keys, counts: [N] of all rows to come, distinct, the most frequent first. about: more for the header, which
        nobody interprets. Raises ConfigError for a dtype that is not float16 or int8, ShapeError."""
        if dtype not in _ROW_DTYPES:
            raise ConfigError(f"n-gram rows are float16 or int8, not {dtype}")
        if len(counts) != len(keys):
            raise ShapeError(f"{len(counts)} counts do not fit {len(keys)} keys")
        self._path, self._dtype, self._width = Path(path), dtype, width
        self._index = build_index(keys)
        self._counts, self._missing = np.minimum(counts, np.iinfo(np.uint32).max).astype(np.uint32), len(keys)
        self._scales = np.empty((len(keys) if dtype == torch.int8 else 0, 3), np.float32)
        self._about = {**(about or {}), "format": _FORMAT, "fingerprint": fingerprint, "digest": "0" * 2 * _DIGEST}
        self._written = hashlib.blake2b(digest_size=_DIGEST)

    def __enter__(self) -> Self:
        """Raises ConfigError when another process makes this file; OSError."""
        with ExitStack() as undo:
            lock = os.open(self._path.with_name(f".{self._path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
            undo.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"another process is writing {self._path}; wait for it, or give another name"
                ) from error
            descriptor, part = tempfile.mkstemp(suffix=".part", dir=self._path.parent)
            self._part = Path(part)
            undo.callback(self._part.unlink, missing_ok=True)
            self._file = undo.enter_context(os.fdopen(descriptor, "wb"))
            self._write_head()
            self._undo = undo.pop_all()
        return self

    def add(self, rows: Tensor) -> None:
        """The next rows, [n, 3, H] floats in host memory. Raises ShapeError, OSError, CorruptFile for NaN, infinity."""
        if rows.shape[1:] != (3, self._width) or len(rows) > self._missing:
            raise ShapeError(f"rows {list(rows.shape)} do not fit [at most {self._missing}, 3, {self._width}]")
        if not bool(torch.isfinite(rows.to(self._dtype) if self._dtype == torch.float16 else rows).all()):
            raise CorruptFile("the backbone gave n-gram rows that are not finite, or too large for float16; use int8")
        if self._dtype == torch.int8:
            rows = rows.float()
            scales = rows.abs().amax(2).clamp_min(1e-12) / 127
            first = len(self._counts) - self._missing
            self._scales[first : first + len(rows)] = scales.numpy()
            rows = (rows / scales.unsqueeze(2)).round()
        self._write(rows.to(self._dtype).contiguous().numpy().data)
        self._missing -= len(rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Raises ShapeError when rows are missing, OSError; then the file of that name is as it was."""
        with self._undo:
            if kind is not None:
                return
            if self._missing:
                raise ShapeError(f"{self._missing} rows of {self._path} are missing")
            self._write(self._scales.data)
            self._file.seek(0)
            self._write_header(self._written.hexdigest())
            self._file.flush()
            os.fchmod(self._file.fileno(), _mode_of(self._path))
            os.fsync(self._file.fileno())
            os.rename(self._part, self._path)

    def _write(self, data: memoryview) -> None:
        self._written.update(data)
        self._file.write(data)

    def _write_head(self) -> None:
        """Header, index and counts: what is known before the first row."""
        self._write_header(self._about["digest"])
        self._write(self._index.data)
        self._write(self._counts.data)

    def _write_header(self, digest: str) -> None:
        """digest: of all that follows; always of one length."""
        count, row_bytes = len(self._counts), 3 * self._width * self._dtype.itemsize
        parts: list[tuple[str, torch.dtype, tuple[int, ...], int]] = [
            ("index", torch.uint64, self._index.shape, self._index.nbytes),
            ("counts", torch.uint32, (count,), self._counts.nbytes),
            ("rows", self._dtype, (count, 3, self._width), count * row_bytes),
        ]
        if self._dtype == torch.int8:
            parts.append(("scales", torch.float32, (count, 3), self._scales.nbytes))
        header: dict[str, Any] = {"__metadata__": self._about | {"digest": digest}}
        offset = 0
        for name, dtype, shape, num_bytes in parts:
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, offset + num_bytes]}
            offset += num_bytes
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % 64)  # the data begins with a cache line
        self._file.write(len(text).to_bytes(8, "little") + text)


def _digest_of(file: BinaryIO) -> str:
    """Of the rest of it."""
    digest = hashlib.blake2b(digest_size=_DIGEST)
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _mode_of(path: Path) -> int:
    """Permissions of a file that is written anew: those it has, else what the process gives new files."""
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        umask = os.umask(0o077)
        os.umask(umask)
        return 0o666 & ~umask


def _parse(memory: mmap.mmap, size: int, path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What the header says, and the tensors, all of whose bytes are there. Raises CorruptFile."""
    length = int.from_bytes(memory[:8], "little")
    try:
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(memory[8 : 8 + length])
        about = header.pop("__metadata__")
        if about["format"] != _FORMAT:
            raise ValueError(f"format {about['format']!r} is not {_FORMAT}")
        tensors = {name: _tensor(memory, entry, 8 + length, size) for name, entry in header.items()}
        index, counts, rows = tensors["index"], tensors["counts"], tensors["rows"]
        num_rows, places = len(rows), len(index)
        fits = index.shape == (places, 2) and counts.shape == (num_rows,) and rows.shape == (num_rows, 3, rows.shape[2])
        fits &= (index.dtype, counts.dtype) == (torch.uint64, torch.uint32) and rows.dtype in _ROW_DTYPES
        if not fits or places < 1 or places & (places - 1) or num_rows > places // 2:
            raise ValueError(f"an index {list(index.shape)} for rows {list(rows.shape)} of {rows.dtype}")
        if rows.dtype == torch.int8:
            scales = tensors["scales"]
            if scales.shape != (num_rows, 3) or scales.dtype != torch.float32:
                raise ValueError("int8 rows without their scales")
        str(about["fingerprint"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CorruptFile(f"{path} is no n-gram table, or damaged ({error}); {_AGAIN}") from error
    return about, tensors


def _tensor(memory: mmap.mmap, entry: Mapping[str, Any], data: int, size: int) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], [int(n) for n in entry["shape"]]
    begin, end = (data + int(offset) for offset in entry["data_offsets"])
    count = math.prod(shape)
    if end - begin != count * dtype.itemsize or begin < data or end > size or min(shape, default=0) < 0:
        raise ValueError(f"{size} bytes hold no {shape} of {dtype} from {begin} on")
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(shape)


@numba.njit(nogil=True, cache=True)
def _gather_half(table, rows, out, width):  # type: ignore[no-untyped-def]
    for i in range(len(rows)):
        if rows[i] >= 0:
            begin, to = np.uint64(rows[i]) * np.uint64(width), np.uint64(i) * np.uint64(width)
            for h in range(np.uint64(width)):
                store(out, to + h, load(table[begin + h]))


@numba.njit(nogil=True, cache=True)
def _gather_scaled(table, scales, rows, out, width):  # type: ignore[no-untyped-def]
    for i in range(len(rows)):
        if rows[i] >= 0:
            for s in range(np.uint64(3)):
                row = np.uint64(rows[i]) * np.uint64(3) + s
                begin, to = row * np.uint64(width), (np.uint64(i) * np.uint64(3) + s) * np.uint64(width)
                scale = scales[row]
                for h in range(np.uint64(width)):
                    store(out, to + h, np.float32(table[begin + h]) * scale)
