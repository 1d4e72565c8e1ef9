"""Handing tensors to numba kernels: rows as one flat array, bfloat16 as uint16, arithmetic in float32.

A kernel takes each [rows, width] tensor as `(flat, stride)`: number h of row t is flat[t * stride + h]. Whatever the
strides of the tensor, the kernel sees one array type per dtype: it is compiled once per dtype, and its inner loops run
over neighbouring numbers. Positions are unsigned: numba wraps negative indices, and that test keeps loops scalar.
"""

# numba compiles the functions below; their bodies carry no runtime types.
from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray
from torch import Tensor

from vbert.errors import ShapeError

__all__ = ["Rows", "as_rows", "as_rows_of_half", "load", "store", "use_threads"]

_WORK_PER_THREAD = 1 << 16  # multiply-adds, some 10 us: less than waking a thread is worth

Rows = tuple[NDArray[Any], np.uint64]


def as_rows(tensor: Tensor) -> Rows:
    """The memory of a CPU tensor [rows, width] as (flat, stride); the width is contiguous, rows may be strided.

    Raises ShapeError for other dtypes, devices or layouts.
    """
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16, torch.int32):
        raise ShapeError(f"a CPU kernel takes float32, bfloat16 or int32 on cpu, got {tensor.dtype} on {tensor.device}")
    flat = _flat(tensor)
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy(), np.uint64(tensor.stride(0))


def as_rows_of_half(tensor: Tensor) -> Rows:
    """The same of float16, which kernels can only read: as int16, so that `load` tells it from bfloat16."""
    return _flat(tensor).view(torch.int16).numpy(), np.uint64(tensor.stride(0))


def _flat(tensor: Tensor) -> Tensor:
    if tensor.dim() != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
        raise ShapeError(f"a CPU kernel takes rows of neighbouring numbers, got strides {tensor.stride()}")
    rows, width = tensor.shape
    return tensor.detach().as_strided((max(0, (rows - 1) * tensor.stride(0) + width),), (1,))


def use_threads(work: int) -> None:
    """Let the next kernel use as many threads as torch does here, and no more than its work (multiply-adds) is worth.

    The compute lane sets torch's thread count to what the machine can give (a busy neighbour makes every
    barrier wait for a time slice, 8 ms measured against 0.2 ms of work); the kernels follow it.
    """
    torch_threads = torch.get_num_threads()
    most = min(torch_threads, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    numba.set_num_threads(max(1, min(most, work // _WORK_PER_THREAD)))
    if torch.get_num_threads() != torch_threads:  # numba's first launch sets OpenMP, and so torch, to all cores
        torch.set_num_threads(torch_threads)


@intrinsic
def _bits_to_float(typing_context, bits):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _float_to_bits(typing_context, value):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _half_to_float(typing_context, bits):  # type: ignore[no-untyped-def]
    """float32 of the 16 bits of a float16. Integer arithmetic: not every processor converts by itself."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        def word(number: int) -> Any:
            return ir.Constant(ir.IntType(32), number)

        magnitude = builder.and_(args[0], word(0x7FFF))
        shifted = builder.shl(magnitude, word(13))
        # The exponents of the two formats are 112 apart; infinities and NaN keep all bits of theirs.
        grown = builder.fmul(builder.bitcast(shifted, ir.FloatType()), ir.Constant(ir.FloatType(), 2.0**112))
        special = builder.icmp_unsigned(">=", magnitude, word(0x7C00))
        unsigned = builder.select(
            special, builder.or_(shifted, word(0x7F800000)), builder.bitcast(grown, ir.IntType(32))
        )
        sign = builder.shl(builder.and_(args[0], word(0x8000)), word(16))
        return builder.bitcast(builder.or_(unsigned, sign), ir.FloatType())

    return types.float32(types.uint32), generate


def load(value: Any) -> Any:
    """float32 of one number of an `as_rows` array. Only inside kernels."""
    raise NotImplementedError("compiled by numba")


@overload(load, inline="always")
def _load(value):  # type: ignore[no-untyped-def]
    if value == types.uint16:
        return lambda value: _bits_to_float(np.uint32(value) << np.uint32(16))  # type: ignore[call-arg]
    if value == types.int16:
        return lambda value: _half_to_float(np.uint32(np.uint16(value)))  # type: ignore[call-arg]
    return lambda value: value


def store(array: Any, i: Any, value: Any) -> None:
    """array[i] = float32 value, rounded to nearest even where the array holds bfloat16. Only inside kernels."""
    raise NotImplementedError("compiled by numba")


@overload(store, inline="always")
def _store(array, i, value):  # type: ignore[no-untyped-def]
    if array.dtype == types.uint16:

        def store_bfloat16(array, i, value):  # type: ignore[no-untyped-def]
            bits: Any = _float_to_bits(np.float32(value))  # type: ignore[call-arg]
            array[i] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

        return store_bfloat16

    def store_float32(array, i, value):  # type: ignore[no-untyped-def]
        array[i] = value

    return store_float32
