"""Operator: each tenant's sparse weight change applied to its own rows of a packed batch."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from vbert.batch import Segments
from vbert.errors import ShapeError
from vbert.kernels.backend import Backend, pick
from vbert.kernels.bf16 import as_array, load, store

__all__ = ["segmented_sparse"]

_BLOCK_ROWS = 32  # rows that share one walk over the non-zeros: four vector registers of float32 on AVX2


def segmented_sparse(
    hidden: Tensor,
    row_starts: Tensor,
    columns: Tensor,
    values: Tensor,
    segments: Segments,
    *,
    out: Tensor,
    backend: Backend | None = None,
) -> Tensor:
    """Add x S of each tenant's sparse matrix S to its own rows.

    For segment s with rows i:j and slot p: out[i:j, columns[p, e]] += hidden[i:j, k] * values[p, e]
    for every input k and every e with row_starts[p, k] <= e < row_starts[p, k + 1].

    Args:
        hidden: [T, H_in] float32 or bfloat16.  out: [T, H_out], may be columns of a wider tensor, updated in place.
        row_starts: [P, H_in + 1] int32, absolute positions in the slot.  columns: [P, N] int32.  values: [P, N], the
            dtype of `hidden`: strided views of the arena, checked when the slot was filled.
    Returns: `out`, accumulated in float32. Raises: ShapeError, KernelUnavailable.
    Source: MaskBert, Zhao et al. 2020, arXiv:2004.12406; Diff pruning, Guo et al. 2020, arXiv:2012.07463; separable
        form, Zhou et al. 2022 (PetS, USENIX ATC).
    """
    if row_starts.shape[1] != hidden.shape[1] + 1 or columns.shape != values.shape:
        raise ShapeError(f"row starts {list(row_starts.shape)} do not fit hidden {list(hidden.shape)}")
    if pick(backend, hidden) is Backend.REFERENCE:
        return reference(hidden, row_starts, columns, values, segments, out)
    slot, start, stop = segments.blocks(_BLOCK_ROWS)
    _cpu(as_array(hidden), row_starts.numpy(), columns.numpy(), as_array(values), slot, start, stop, as_array(out))
    return out


def reference(
    hidden: Tensor, row_starts: Tensor, columns: Tensor, values: Tensor, segments: Segments, out: Tensor
) -> Tensor:
    for p, i, j in zip(segments.slot, segments.start, segments.stop, strict=True):
        starts = row_starts[p].to(torch.int64)
        used = slice(int(starts[0]), int(starts[-1]))
        dense = torch.zeros(hidden.shape[1], out.shape[1])
        inputs = torch.repeat_interleave(torch.arange(hidden.shape[1]), starts.diff())
        dense.index_put_((inputs, columns[p, used].to(torch.int64)), values[p, used].float(), accumulate=True)
        out[i:j] += (hidden[i:j].float() @ dense).to(out.dtype)
    return out


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract"})
def _cpu(hidden, row_starts, columns, values, slot, start, stop, out):  # type: ignore[no-untyped-def]
    width_in, width_out = hidden.shape[1], out.shape[1]
    for b in numba.prange(len(slot)):
        p, first, count = slot[b], start[b], stop[b] - start[b]
        total = np.zeros((width_out, _BLOCK_ROWS), np.float32)  # transposed: one non-zero touches 32 rows at once
        x = np.zeros(_BLOCK_ROWS, np.float32)
        for k in range(width_in):
            begin, end = row_starts[p, k], row_starts[p, k + 1]
            if begin == end:
                continue
            for r in range(count):
                x[r] = load(hidden[first + r, k])
            for e in range(begin, end):
                column, value = columns[p, e], load(values[p, e])
                for r in range(_BLOCK_ROWS):
                    total[column, r] += x[r] * value
        for r in range(count):
            for h in range(width_out):
                store(out, first + r, h, load(out[first + r, h]) + total[h, r])
