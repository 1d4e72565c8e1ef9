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
from vbert.kernels.cuda import addresses, describe, launch
from vbert.kernels.rows import as_rows, load, store, use_threads

__all__ = ["segmented_sparse"]


_ARGUMENTS = describe(
    **dict.fromkeys(("blocks", "row_starts", "columns", "x", "values", "out"), "p"),
    **dict.fromkeys(("row_starts_stride", "columns_stride", "x_stride", "values_stride", "out_stride"), "l"),
    **dict.fromkeys(("width_in", "width_out"), "i"),
)
_CUDA_OUTPUTS = 64  # of a thread block, SPARSE_OUTPUTS in csrc/sparse.cu
_TILE = 16  # columns at a time while a block is transposed: its lines stay in the first-level cache


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
    """Add x S^T of each tenant's sparse weight change S [H_out, H_in] to its own rows.

    For segment s with rows i:j and slot p: out[i:j, o] += sum of hidden[i:j, columns[p, e]] * values[p, e]
    over row_starts[p, o] <= e < row_starts[p, o + 1].

    Args:
        hidden: [T, H_in] float32 or bfloat16, on a GPU also float16.
        out: [T, H_out], may be columns of a wider tensor, updated in place.
        row_starts: [P, H_out + 1] int32, absolute positions in the slot.  columns: [P, N] int32.  values: [P, N], the
            dtype of `hidden`: strided views of the arena, checked when the slot was filled.
    Returns: `out`, accumulated in float32. Raises: ShapeError, KernelUnavailable.
    Source: MaskBert, Zhao et al. 2020, arXiv:2004.12406; Diff pruning, Guo et al. 2020, arXiv:2012.07463; separable
        form, Zhou et al. 2022 (PetS, USENIX ATC).
    """
    if row_starts.shape[1] != out.shape[1] + 1 or columns.shape != values.shape:
        raise ShapeError(f"row starts {list(row_starts.shape)} do not fit out {list(out.shape)}")
    chosen = pick(backend, hidden)
    if chosen is Backend.REFERENCE:
        return reference(hidden, row_starts, columns, values, segments, out)
    if chosen is Backend.CUDA:
        return _cuda(hidden, row_starts, columns, values, segments, out)
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
        dense = torch.zeros(out.shape[1], hidden.shape[1], device=hidden.device)
        outputs = torch.repeat_interleave(torch.arange(out.shape[1], device=hidden.device), starts.diff())
        dense.index_put_((outputs, columns[p, used].to(torch.int64)), values[p, used].float(), accumulate=True)
        out[i:j] += (hidden[i:j].float() @ dense.T).to(out.dtype)
    return out


@intrinsic
def _dot_block(typing_context, x, columns, values, first, last, total, at):  # type: ignore[no-untyped-def]
    """total[at : at + 32] = sum over first <= e < last of values[e] * x[columns[e] * 32 : columns[e] * 32 + 32].

    The sum stays in vector registers, which a loop over an array of 32 would not.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        i32, i64 = ir.IntType(32), ir.IntType(64)
        vector = ir.VectorType(ir.FloatType(), BLOCK_ROWS)
        zero = ir.Constant(vector, None)

        def address(i: int, at: Any) -> Any:
            return builder.gep(context.make_array(signature.args[i])(context, builder, args[i]).data, [at])

        def value_at(e: Any) -> Any:
            number = builder.load(address(2, e))
            if number.type == ir.IntType(16):  # bfloat16
                number = builder.bitcast(builder.shl(builder.zext(number, i32), ir.Constant(i32, 16)), ir.FloatType())
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(i32, 0))
            return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(i32, BLOCK_ROWS), None))

        before = builder.block
        loop, after = (builder.append_basic_block(name) for name in ("loop", "after"))
        builder.cbranch(builder.icmp_unsigned("<", args[3], args[4]), loop, after)
        builder.position_at_end(loop)
        e, partial = builder.phi(i64), builder.phi(vector)
        column = builder.zext(builder.load(address(1, e)), i64)
        row = address(0, builder.mul(column, ir.Constant(i64, BLOCK_ROWS)))
        inputs = builder.load(builder.bitcast(row, vector.as_pointer()), align=4)
        product = builder.fmul(inputs, value_at(e), flags=("contract",))
        added = builder.fadd(partial, product, flags=("contract",))
        following = builder.add(e, ir.Constant(i64, 1))
        for phi, start, step in ((e, args[3], following), (partial, zero, added)):
            phi.add_incoming(start, before)
            phi.add_incoming(step, loop)
        builder.cbranch(builder.icmp_unsigned("<", following, args[4]), loop, after)
        builder.position_at_end(after)
        result = builder.phi(vector)
        result.add_incoming(zero, before)
        result.add_incoming(added, loop)
        builder.store(result, builder.bitcast(address(5, args[6]), vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(x, columns, values, first, last, total, at), generate


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract"})
def _cpu(hidden, row_starts, columns, values, blocks, out, width_in, width_out):  # type: ignore[no-untyped-def]
    (x, x_stride), (y, y_stride), (c, c_stride), (v, v_stride) = hidden, out, columns, values
    starts, starts_stride = row_starts
    size, one = np.uint64(BLOCK_ROWS), np.uint64(1)
    for n in numba.prange(blocks.shape[0]):
        p, first, count = blocks[n, 0], blocks[n, 1], blocks[n, 2]
        s0 = p * starts_stride
        slot_columns, slot_values = c[p * c_stride :], v[p * v_stride :]
        inputs = np.zeros(width_in * size, np.float32)  # transposed: one non-zero touches all rows of the block
        total = np.empty(width_out * size, np.float32)
        for tile in range(np.uint64(0), width_in, np.uint64(_TILE)):
            for r in range(count):
                x0 = (first + r) * x_stride
                for k in range(tile, min(tile + np.uint64(_TILE), width_in)):
                    inputs[k * size + r] = load(x[x0 + k])
        for o in range(width_out):
            begin, end = np.uint64(starts[s0 + o]), np.uint64(starts[s0 + o + one])
            _dot_block(inputs, slot_columns, slot_values, begin, end, total, o * size)  # type: ignore[call-arg]
        for tile in range(np.uint64(0), width_out, np.uint64(_TILE)):
            for r in range(count):
                y0 = (first + r) * y_stride
                for h in range(tile, min(tile + np.uint64(_TILE), width_out)):
                    store(y, y0 + h, load(y[y0 + h]) + total[h * size + r])


def _cuda(
    hidden: Tensor, row_starts: Tensor, columns: Tensor, values: Tensor, segments: Segments, out: Tensor
) -> Tensor:
    blocks = segments.device_blocks(hidden.device)
    tensors = (row_starts, columns, hidden, values, out)
    row = (*addresses(blocks, *tensors), *(t.stride(0) for t in tensors), hidden.shape[1], out.shape[1])
    launch("sparse", np.array([row], _ARGUMENTS), out, (len(blocks), -(-out.shape[1] // _CUDA_OUTPUTS)))
    return out
