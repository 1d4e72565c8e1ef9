"""Operator: overlap-add of tri-gram rows to token rows, step 4 of SkipBERT."""

from __future__ import annotations

from itertools import pairwise

import numba
import numpy as np
import torch
from torch import Tensor

from vbert.errors import ShapeError
from vbert.kernels.backend import Backend, pick
from vbert.kernels.cuda import CODES, THREADS, address, describe, launch
from vbert.kernels.rows import as_rows, as_rows_of_half, load, store

__all__ = ["merge_rows"]

_ARGUMENTS = describe(
    **dict.fromkeys(("rows", "cu_seqlens", "out"), "p"),
    **dict.fromkeys(("row_stride", "out_stride"), "l"),
    **dict.fromkeys(("tokens", "sequences", "width", "row_scalar"), "i"),
)
_TOKENS_OF_A_BLOCK = THREADS // 32


def merge_rows(rows: Tensor, cu_seqlens: Tensor, *, out: Tensor, backend: Backend | None = None) -> Tensor:
    """Add up what the tri-grams around a token say of it: out[i] = u[i, 1] + u[i + 1, 0] + u[i - 1, 2].

    A neighbour outside the sequence of token i adds nothing. Any thread may call it, beside kernels of other threads:
    on a CPU it takes one core and releases the GIL.

    Args:
        rows: u [T, 3, H] float32, float16 or bfloat16; tri-gram i is centred on token i.
        cu_seqlens: [B + 1] int32, first 0, last T, where `rows` is.
        out: [T, H] float32 or bfloat16, on a GPU also float16.
    Returns: `out`, added up in float32. Raises: ShapeError, KernelUnavailable.
    Source: Wang et al. 2022, SkipBERT (ACL).
    """
    if rows.dim() != 3 or rows.shape[1] != 3 or out.shape != (rows.shape[0], rows.shape[2]):
        raise ShapeError(f"tri-gram rows {list(rows.shape)} do not fit {list(out.shape)}; they are [T, 3, H]")
    if rows.dtype not in CODES or cu_seqlens.dtype != torch.int32 or rows.stride(1) != rows.shape[2]:
        raise ShapeError(f"rows are floats with contiguous [3, H] and cu_seqlens int32, not {rows.dtype}")
    chosen = pick(backend, out)
    if chosen is Backend.REFERENCE:
        return reference(rows, cu_seqlens, out)
    if chosen is Backend.CUDA:
        return _cuda(rows, cu_seqlens, out)
    flat = rows.flatten(1)
    words = as_rows_of_half(flat) if rows.dtype == torch.float16 else as_rows(flat)
    _cpu(words, cu_seqlens.numpy(), as_rows(out), np.uint64(out.shape[1]))
    return out


def reference(rows: Tensor, cu_seqlens: Tensor, out: Tensor) -> Tensor:
    bounds = cu_seqlens.tolist()
    for i, j in pairwise(bounds):
        u = rows[i:j].float()
        y = u[:, 1].clone()
        y[:-1] += u[1:, 0]
        y[1:] += u[:-1, 2]
        out[i:j] = y.to(out.dtype)
    return out


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _cpu(rows, cu_seqlens, out, width):  # type: ignore[no-untyped-def]
    (u, u_stride), (y, y_stride) = rows, out
    one, two = np.uint64(1), np.uint64(2)
    total = np.empty(width, np.float32)
    for s in range(cu_seqlens.shape[0] - 1):
        first, last = np.uint64(cu_seqlens[s]), np.uint64(cu_seqlens[s + 1])
        for i in range(first, last):
            u0 = i * u_stride
            for h in range(width):
                total[h] = load(u[u0 + width + h])
            if i + one < last:
                for h in range(width):
                    total[h] += load(u[u0 + u_stride + h])
            if i > first:
                for h in range(width):
                    total[h] += load(u[u0 - u_stride + two * width + h])
            for h in range(width):
                store(y, i * y_stride + h, total[h])


def _cuda(rows: Tensor, cu_seqlens: Tensor, out: Tensor) -> Tensor:
    sizes = len(out), len(cu_seqlens) - 1, out.shape[1], CODES[rows.dtype]
    row = (address(rows), address(cu_seqlens), address(out), rows.stride(0), out.stride(0), *sizes)
    launch("merge_rows", np.array([row], _ARGUMENTS), out, (-(-len(out) // _TOKENS_OF_A_BLOCK), 1))
    return out
