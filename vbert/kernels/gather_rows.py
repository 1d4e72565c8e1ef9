"""Operator: rows of a table by index, such as the word rows of a batch."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vbert.errors import ShapeError
from vbert.kernels.backend import Backend, pick
from vbert.kernels.cuda import THREADS, address, describe, launch

__all__ = ["gather_rows"]

_ARGUMENTS = describe(
    **dict.fromkeys(("table", "index", "out"), "p"),
    **dict.fromkeys(("table_stride", "out_stride", "row_bytes", "rows"), "l"),
)
_ROWS_OF_A_BLOCK = THREADS // 32


def gather_rows(table: Tensor, index: Tensor, *, out: Tensor, backend: Backend | None = None) -> Tensor:
    """Copy rows: out[i] = table[index[i]], zeros where index[i] is -1.

    Any thread may call it, beside kernels of other threads: on a CPU it takes one core and releases the GIL.

    Args:
        table: [N, W] of any dtype, rows may be strided; on a CPU it may be memory-mapped.
        index: [n] int64, -1 <= index < N; not checked, since that would read it back from a GPU.
        out: [n, W], the dtype of `table`.
    Returns: `out`. Raises: ShapeError, KernelUnavailable.
    """
    fits = index.dim() == 1 and index.dtype == torch.int64 and out.shape == (len(index), table.shape[1])
    if not fits or out.dtype != table.dtype or not index.is_contiguous():
        raise ShapeError(
            f"index {list(index.shape)} {index.dtype} of a table {list(table.shape)} {table.dtype} "
            f"does not fit {list(out.shape)} {out.dtype}"
        )
    chosen = pick(backend, out)
    if chosen is Backend.REFERENCE:
        return reference(table, index, out)
    if chosen is Backend.CUDA:
        return _cuda(table, index, out)
    if len(index):
        from_words, to_words = _as_words(table, out)
        _cpu(from_words, to_words, index.numpy())
    return out


def reference(table: Tensor, index: Tensor, out: Tensor) -> Tensor:
    for i, row in enumerate(index.tolist()):
        out[i] = 0 if row < 0 else table[row]
    return out


def _as_words(*tensors: Tensor) -> list[NDArray[Any]]:
    """The same memory as the widest words that fit all rows: eight bytes where possible."""
    itemsize = tensors[0].element_size()
    sizes = [n * itemsize for t in tensors for n in (t.shape[1], t.stride(0))] + [t.data_ptr() for t in tensors]
    word = next(size for size in (8, 4, 2, 1) if all(n % size == 0 for n in sizes))
    plain = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize]
    return [t.view(plain).numpy().view(f"u{word}") for t in tensors]


@numba.njit(nogil=True, cache=True)
def _cpu(table, out, index):  # type: ignore[no-untyped-def]
    for i in range(index.shape[0]):
        if index[i] < 0:
            out[i, :] = 0
        else:
            out[i, :] = table[index[i], :]


def _cuda(table: Tensor, index: Tensor, out: Tensor) -> Tensor:
    size = table.element_size()
    strides = table.stride(0) * size, out.stride(0) * size
    row = (address(table), address(index), address(out), *strides, table.shape[1] * size, len(index))
    grid = -(-len(index) // _ROWS_OF_A_BLOCK), 1
    launch("gather_rows", np.array([row], _ARGUMENTS), out, grid, dtype=torch.float32)  # bytes: one build for all
    return out
