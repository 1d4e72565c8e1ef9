"""Reading and writing float32 and bfloat16 inside numba kernels: bfloat16 travels as uint16, arithmetic is float32."""

# numba compiles the functions below; their bodies carry no runtime types.
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray
from torch import Tensor

from vbert.errors import ShapeError

__all__ = ["as_array", "load", "store"]


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The memory of a CPU tensor as a numpy array, bfloat16 as uint16. Raises ShapeError for others."""
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16):
        raise ShapeError(f"a CPU kernel takes float32 or bfloat16 on cpu, got {tensor.dtype} on {tensor.device}")
    array: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


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


def load(value: Any) -> Any:
    """float32 of one number of an `as_array` array. Only inside kernels."""
    raise NotImplementedError("compiled by numba")


@overload(load, inline="always")
def _load(value):  # type: ignore[no-untyped-def]
    if value == types.uint16:
        return lambda value: _bits_to_float(np.uint32(value) << np.uint32(16))  # type: ignore[call-arg]
    return lambda value: value


def store(array: Any, i: Any, j: Any, value: Any) -> None:
    """array[i, j] = float32 value, rounded to nearest even where the array holds bfloat16. Only inside kernels."""
    raise NotImplementedError("compiled by numba")


@overload(store, inline="always")
def _store(array, i, j, value):  # type: ignore[no-untyped-def]
    if array.dtype == types.uint16:

        def store_bfloat16(array, i, j, value):  # type: ignore[no-untyped-def]
            bits: Any = _float_to_bits(np.float32(value))  # type: ignore[call-arg]
            array[i, j] = np.uint16(
                (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            )

        return store_bfloat16

    def store_float32(array, i, j, value):  # type: ignore[no-untyped-def]
        array[i, j] = value

    return store_float32
