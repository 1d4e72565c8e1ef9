"""Operator: each tenant's sparse weight change applied to its own rows of a packed batch."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from vbert.batch import BLOCK_ROWS, Segments
from vbert.errors import ShapeError
from vbert.kernels.backend import Backend, pick
from vbert.kernels.rows import as_rows, load, store, use_threads

__all__ = ["segmented_sparse"]


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
    use_threads(len(segments.rows) * columns.shape[1] // 4)
    matrix = as_rows(row_starts), as_rows(columns), as_rows(values)
    widths = np.uint64(hidden.shape[1]), np.uint64(out.shape[1])
    _cpu(as_rows(hidden), *matrix, segments.blocks, as_rows(out), *widths)
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


@intrinsic
def _axpy_block(typing_context, total, at, x, start, value):  # type: ignore[no-untyped-def]
    """total[at : at + 32] += x[start : start + 32] * value, as one vector: a loop would be guarded against overlap."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vector = ir.VectorType(ir.FloatType(), BLOCK_ROWS)

        def address(i: int) -> Any:
            data = context.make_array(signature.args[i])(context, builder, args[i]).data
            return builder.bitcast(builder.gep(data, [args[i + 1]]), vector.as_pointer())

        target = address(0)
        splat = builder.insert_element(ir.Constant(vector, ir.Undefined), args[4], ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), BLOCK_ROWS), None)
        product = builder.fmul(
            builder.load(address(2), align=4), builder.shuffle_vector(splat, splat, zeros), flags=("contract",)
        )
        builder.store(builder.fadd(builder.load(target, align=4), product, flags=("contract",)), target, align=4)
        return context.get_dummy_value()

    return types.void(total, at, x, start, value), generate


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract"})
def _cpu(hidden, row_starts, columns, values, blocks, out, width_in, width_out):  # type: ignore[no-untyped-def]
    (x, x_stride), (y, y_stride), (c, c_stride), (v, v_stride) = hidden, out, columns, values
    starts, starts_stride = row_starts
    size = np.uint64(BLOCK_ROWS)
    for n in numba.prange(blocks.shape[0]):
        p, first, count = blocks[n, 0], blocks[n, 1], blocks[n, 2]
        c0, v0, s0 = p * c_stride, p * v_stride, p * starts_stride
        inputs = np.zeros(width_in * size, np.float32)  # transposed: one non-zero touches all rows of the block
        total = np.zeros(width_out * size, np.float32)
        for r in range(count):
            for k in range(width_in):
                inputs[k * size + r] = load(x[(first + r) * x_stride + k])
        for k in range(width_in):
            for e in range(np.uint64(starts[s0 + k]), np.uint64(starts[s0 + k + np.uint64(1)])):
                _axpy_block(total, np.uint64(c[c0 + e]) * size, inputs, k * size, load(v[v0 + e]))  # type: ignore[call-arg]
        for r in range(count):
            y0 = (first + r) * y_stride
            for h in range(width_out):
                store(y, y0 + h, load(y[y0 + h]) + total[h * size + r])
