"""Operator: a shared linear in bfloat16 on a CPU, by oneDNN, which torch multiplies bfloat16 with.

oneDNN compiles a kernel for each number of rows it meets: milliseconds, and half a megabyte of the last thousand. And a
product of torch packs the weights every time, which for the rows of a short text takes half as long as the product. So
rows are filled up to one of a few numbers, and weights are packed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vbert.workspace import Workspace

__all__ = ["half_linear", "packed", "takes_half", "whole_rows"]

_LEAST, _STEPS = 4, 16  # rows; numbers of rows from one power of two to the next
_SPARE = "half_linear"  # name of the buffer that rows are filled up in


def takes_half(tensor: Tensor) -> bool:
    """Whether it is for `half_linear`."""
    return tensor.dtype == torch.bfloat16 and tensor.is_cpu


def whole_rows(count: int) -> int:
    """How many rows are multiplied for so many: at most a sixteenth more, from 64 on."""
    step = max(_LEAST, (1 << max(0, count.bit_length() - 1)) // _STEPS)
    return -(-count // step) * step


def packed(weight: Tensor) -> Tensor | None:
    """[out, in] bfloat16 weights in the order in which the machine multiplies them, about as large as before; None
    where oneDNN has no bfloat16. Only for `half_linear`."""
    if not takes_half(weight) or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _LEAST * _STEPS)
    return out


def half_linear(x: Tensor, weight: Tensor, bias: Tensor, name: str, space: Workspace) -> Tensor:
    """x W^T + b, [T, out].

    Args: x: [T, in] bfloat16.  weight: [out, in], or what `packed` made of it.  bias: [out].  name: of a buffer in
    `space` that the result may be in. Rows of memory after those of x may be read, and count for nothing.
    """
    count = len(x)
    rows = _filled(x, whole_rows(count), space)
    if weight.is_mkldnn:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    else:
        out = torch.addmm(bias, rows, weight.t(), out=space.rows(name, len(rows), len(bias)))
    return out[:count]


def _filled(x: Tensor, rows: int, space: Workspace) -> Tensor:
    """[rows, in], of which the first are x: itself where its memory goes on, else a copy."""
    count, width = x.shape
    if rows == count:
        return x
    begin, size = x.storage_offset(), x.untyped_storage().nbytes() // x.element_size()
    if x.is_contiguous() and begin + rows * width <= size:
        return x.as_strided((rows, width), (width, 1))
    out = space.rows(_SPARE, rows, width)
    out[:count] = x
    return out
