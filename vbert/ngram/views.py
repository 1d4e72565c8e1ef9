"""What the n-grams around a token say of it, added up straight from where their rows lie: gather and merge in one pass.

vbert/kernels/merge_rows.py does the same to rows that were gathered before, on any device; this one reads host memory.
Source: Wang et al. 2022, SkipBERT (ACL), step "overlap-add".
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vbert.errors import ShapeError
from vbert.kernels.rows import as_rows, as_rows_of_half, load
from vbert.ngram.index import Rows

__all__ = ["add_views"]


def add_views(
    table: Tensor, rows: Rows, cu_seqlens: NDArray[np.int64], *, out: Tensor, scales: Tensor | None = None
) -> Tensor:
    """out[i] += u[i][1] + u[i + 1][0] + u[i - 1][2] inside each sequence, u[i] being row rows[i] of the table, 0 if -1.

    Any thread may call it: it takes one core and releases the GIL.

    Args:
        table: [N, 3, H] contiguous, float16, bfloat16, float32, or int8 with scales [N, 3] float32, host memory.
        rows: [T] int64, -1 for none. cu_seqlens: [B + 1] int64, first 0, last T. out: [T, H] float32.
    Returns: `out`. Raises: ShapeError.
    """
    if table.dim() != 3 or table.shape[1] != 3 or not table.is_contiguous():
        raise ShapeError(f"the rows of n-grams are [N, 3, H] and contiguous, not {list(table.shape)}")
    width = table.shape[2]
    if out.shape != (len(rows), width) or out.dtype != torch.float32 or not out.is_contiguous():
        raise ShapeError(f"{len(rows)} tokens of width {width} do not fit {list(out.shape)} of {out.dtype}")
    if len(rows) and int(rows.max()) >= len(table):
        raise ShapeError(f"row {int(rows.max())} is beyond the {len(table)} of the table")
    if not len(table) or not len(rows):
        return out
    flat_out = out.view(-1).numpy()
    if table.dtype == torch.int8:
        if scales is None or scales.shape != table.shape[:2]:
            raise ShapeError("int8 rows need their scales [N, 3]")
        _add_scaled(table.view(-1).numpy(), scales.view(-1).numpy(), rows, cu_seqlens, flat_out, np.uint64(width))
        return out
    flat = table.view(len(table), 3 * width)
    words, _ = as_rows_of_half(flat) if table.dtype == torch.float16 else as_rows(flat)
    _add(words, rows, cu_seqlens, flat_out, np.uint64(width))
    return out


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _add(table, rows, cu_seqlens, out, width):  # type: ignore[no-untyped-def]
    three, two = np.uint64(3), np.uint64(2)
    for s in range(len(cu_seqlens) - 1):
        first, last = cu_seqlens[s], cu_seqlens[s + 1]
        for i in range(first, last):
            if rows[i] < 0:
                continue
            begin, to = np.uint64(rows[i]) * three * width, np.uint64(i) * width
            for h in range(width):
                out[to + h] += load(table[begin + width + h])
            if i > first:
                for h in range(width):
                    out[to - width + h] += load(table[begin + h])
            if i + 1 < last:
                for h in range(width):
                    out[to + width + h] += load(table[begin + two * width + h])


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _add_scaled(table, scales, rows, cu_seqlens, out, width):  # type: ignore[no-untyped-def]
    three, two, one = np.uint64(3), np.uint64(2), np.uint64(1)
    for s in range(len(cu_seqlens) - 1):
        first, last = cu_seqlens[s], cu_seqlens[s + 1]
        for i in range(first, last):
            if rows[i] < 0:
                continue
            row = np.uint64(rows[i]) * three
            begin, to = row * width, np.uint64(i) * width
            left, centre, right = scales[row], scales[row + one], scales[row + two]
            for h in range(width):
                out[to + h] += np.float32(table[begin + width + h]) * centre
            if i > first:
                for h in range(width):
                    out[to - width + h] += np.float32(table[begin + h]) * left
            if i + 1 < last:
                for h in range(width):
                    out[to + width + h] += np.float32(table[begin + two * width + h]) * right
