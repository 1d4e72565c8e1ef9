"""Operators on a CPU: the mean of the rows of each sequence, and rows of length one.

The same in torch is half a dozen operators that nothing else of a forward uses. Their code is in no cache when a
forward ends, and fetching it takes ten times as long as running it: a third of a millisecond for a lone text.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vbert.errors import ShapeError
from vbert.kernels.backend import Backend
from vbert.kernels.rows import as_rows, load

__all__ = ["mean_rows", "unit_rows"]

_LEAST_NORM = np.float32(1e-12)


def mean_rows(x: Tensor, cu_seqlens: NDArray[np.int64], *, out: Tensor, backend: Backend | None = None) -> Tensor:
    """out[b] = mean of x[cu_seqlens[b] : cu_seqlens[b + 1]].

    Args: x: [T, H] float32 or bfloat16 on the CPU.  cu_seqlens: [B + 1], each sequence with at least one row; values
        are not checked.  out: [B, H] contiguous float32.
    Returns: `out`. Raises: ShapeError.
    """
    fits = out.shape == (len(cu_seqlens) - 1, x.shape[1]) and x.dtype in (torch.float32, torch.bfloat16)
    if not fits or out.dtype != torch.float32 or not out.is_contiguous():
        raise ShapeError(
            f"means of {len(cu_seqlens) - 1} sequences of rows {list(x.shape)} {x.dtype} do not fit {list(out.shape)} "
            f"{out.dtype}; they are contiguous float32"
        )
    if backend is Backend.REFERENCE:
        for i, row in enumerate(out):
            row.copy_(x[cu_seqlens[i] : cu_seqlens[i + 1]].float().mean(0))
        return out
    _mean(*as_rows(x), cu_seqlens, out.numpy())
    return out


def unit_rows(x: Tensor, *, out: Tensor, backend: Backend | None = None) -> Tensor:
    """out[b] = x[b] / |x[b]|, zeros where x[b] is 0. x, out: [B, H] float32 on the CPU, and may be the same.

    Returns: `out`. Raises: ShapeError.
    """
    if out.shape != x.shape or not x.dtype == out.dtype == torch.float32 or not out.is_contiguous():
        raise ShapeError(
            f"unit rows of {list(x.shape)} {x.dtype} do not fit {list(out.shape)} {out.dtype}; both are float32, and "
            "the second is contiguous"
        )
    if backend is Backend.REFERENCE:
        return out.copy_(x / x.norm(dim=1, keepdim=True).clamp_min(float(_LEAST_NORM)))
    _unit(*as_rows(x), out.numpy())
    return out


@numba.njit(nogil=True, cache=True)
def _mean(flat, stride, cu_seqlens, out):  # type: ignore[no-untyped-def]
    width = np.uint64(out.shape[1])
    for b in range(len(out)):
        first, last = np.uint64(cu_seqlens[b]), np.uint64(cu_seqlens[b + 1])
        row = out[b]
        row[:] = np.float32(0.0)
        for t in range(first, last):
            begin = t * stride
            for h in range(width):
                row[h] += load(flat[begin + h])
        count = np.float32(last - first)
        for h in range(width):
            row[h] /= count


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _unit(flat, stride, out):  # type: ignore[no-untyped-def]
    width = np.uint64(out.shape[1])
    for b in range(len(out)):
        begin = np.uint64(b) * stride
        total = np.float32(0.0)
        for h in range(width):
            total += flat[begin + h] * flat[begin + h]
        norm = max(np.float32(np.sqrt(total)), _LEAST_NORM)
        for h in range(width):
            out[b, h] = flat[begin + h] / norm
