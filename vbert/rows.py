"""Rows from elsewhere: what a forward reads in place of a table in the model's memory.

`MappedRows` is a table [V, H] in a file that is mapped, not read, so that it takes no device memory and only as much of
the page cache as its popular rows need. The file is safetensors, with the backbone's fingerprint in its header.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save
from torch import Tensor

from vbert.batch import PackedRows
from vbert.errors import CorruptFile, WrongBackbone
from vbert.kernels.gather_rows import gather_rows
from vbert.memory import mapped

__all__ = ["MappedRows", "RowSource", "publish_rows"]

_FORMAT = "vbert.rows.1"
_NAME = "rows"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_HEADER_BYTES = 1 << 16


class RowSource(Protocol):
    """Where the rows of a batch come from, one a token. Any thread may call; the GIL is released while it copies."""

    @property
    def width(self) -> int:
        """Numbers in a row."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    def gather(self, rows: PackedRows, out: Tensor) -> None:
        """Fill `out` [T, width] of this dtype, host memory, with the rows of a batch."""
        ...


class MappedRows:
    """Word-embedding rows out of a mapped table. A truncated file is refused when it is opened."""

    def __init__(self, path: str | os.PathLike[str], fingerprint: str) -> None:
        """Raises OSError, CorruptFile, WrongBackbone."""
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                memory = mapped(file)
            except ValueError as error:  # an empty file
                raise CorruptFile(f"the row table {path} is empty; delete it and start again") from error
        shape, self.dtype, begin = _parse_header(memory, size, fingerprint, Path(path))
        self.table = torch.frombuffer(memory, dtype=self.dtype, offset=begin).view(shape)  # [V, H]

    @property
    def width(self) -> int:
        return self.table.shape[1]

    def gather(self, rows: PackedRows, out: Tensor) -> None:
        gather_rows(self.table, rows.token_ids, out=out)


def publish_rows(path: Path, table: Tensor, fingerprint: str) -> None:
    """Write a table [V, H] under its name at once or not at all, also when two processes do. Raises OSError."""
    data = save({_NAME: table.contiguous()}, {"format": _FORMAT, "fingerprint": fingerprint})
    descriptor, name = tempfile.mkstemp(suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _parse_header(memory: mmap.mmap, size: int, fingerprint: str, path: Path) -> tuple[list[int], torch.dtype, int]:
    """Shape, dtype and first byte of the table."""
    length = int.from_bytes(memory[:8], "little")
    try:
        if not 8 <= size - length <= size - 2 or length > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(memory[8 : 8 + length])
        about, entry = header["__metadata__"], header[_NAME]
        dtype, shape = _DTYPES[entry["dtype"]], [int(n) for n in entry["shape"]]
        begin, end = (8 + length + int(offset) for offset in entry["data_offsets"])
        if about["format"] != _FORMAT or len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"format {about['format']!r}, shape {shape}")
        if end - begin != shape[0] * shape[1] * dtype.itemsize or begin < 8 or end > size:
            raise ValueError(f"{size} bytes hold no {shape[0]} x {shape[1]} numbers of {dtype}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFile(f"the row table {path} is damaged ({error}); delete it and start again") from error
    if about["fingerprint"] != fingerprint:
        raise WrongBackbone(
            f"the row table {path} belongs to backbone {about['fingerprint']}, this is {fingerprint}; delete the file"
        )
    return shape, dtype, begin
