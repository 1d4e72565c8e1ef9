"""Operator: each tenant's own LayerNorm over its rows of a packed batch."""

from __future__ import annotations

import numba
import numpy as np
import torch.nn.functional as F
from torch import Tensor

from vbert.batch import Segments
from vbert.errors import ShapeError
from vbert.kernels.backend import Backend, pick
from vbert.kernels.cuda import addresses, describe, launch
from vbert.kernels.rows import as_rows, load, store, use_threads

__all__ = ["segmented_layer_norm"]

_ARGUMENTS = describe(
    **dict.fromkeys(("blocks", "x", "weight", "bias", "out"), "p"),
    **dict.fromkeys(("x_stride", "weight_stride", "bias_stride", "out_stride"), "l"),
    width="i",
    eps="f",
)


def segmented_layer_norm(
    rows: Tensor,
    weight_slots: Tensor,
    bias_slots: Tensor,
    segments: Segments,
    *,
    eps: float,
    out: Tensor,
    backend: Backend | None = None,
) -> Tensor:
    """LayerNorm with the tenant's weight and bias; rows of nobody stay as they are in `out`.

    For segment s with rows i:j and slot p: out[i:j] = layer_norm(rows[i:j], weight_slots[p], bias_slots[p], eps)

    Args:
        rows, out: [T, H] float32 or bfloat16, on a GPU also float16.
        weight_slots, bias_slots: [P, H] strided views of the arena.
    Returns: `out`. Raises: ShapeError, KernelUnavailable.
    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    if weight_slots.shape[1] != rows.shape[1] or bias_slots.shape[1] != rows.shape[1] or rows.shape != out.shape:
        raise ShapeError(f"weight {list(weight_slots.shape)} does not fit {list(rows.shape)} -> {list(out.shape)}")
    chosen = pick(backend, rows)
    if chosen is Backend.REFERENCE:
        return reference(rows, weight_slots, bias_slots, segments, eps, out)
    if chosen is Backend.CUDA:
        return _cuda(rows, weight_slots, bias_slots, segments, eps, out)
    use_threads(3 * out.shape[1] * len(segments.rows))
    weight, bias = as_rows(weight_slots), as_rows(bias_slots)
    _cpu(as_rows(rows), weight, bias, segments.row_index, np.float32(eps), as_rows(out), np.uint64(out.shape[1]))
    return out


def reference(
    rows: Tensor, weight_slots: Tensor, bias_slots: Tensor, segments: Segments, eps: float, out: Tensor
) -> Tensor:
    for p, i, j in zip(segments.slot, segments.start, segments.stop, strict=True):
        weight, bias = weight_slots[p].float(), bias_slots[p].float()
        out[i:j] = F.layer_norm(rows[i:j].float(), (rows.shape[1],), weight, bias, eps).to(out.dtype)
    return out


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _cpu(rows, weight, bias, row_index, eps, out, width):  # type: ignore[no-untyped-def]
    (x, x_stride), (g, g_stride), (b, b_stride), (y, y_stride) = rows, weight, bias, out
    for n in numba.prange(row_index.shape[0]):
        t, p = row_index[n, 0], row_index[n, 1]
        x0, y0, g0, b0 = t * x_stride, t * y_stride, p * g_stride, p * b_stride
        total = np.float32(0.0)
        for h in range(width):
            total += load(x[x0 + h])
        mean = total / np.float32(width)
        squares = np.float32(0.0)
        for h in range(width):
            centred = load(x[x0 + h]) - mean
            squares += centred * centred
        inverse = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        for h in range(width):
            store(y, y0 + h, (load(x[x0 + h]) - mean) * inverse * load(g[g0 + h]) + load(b[b0 + h]))


def _cuda(
    rows: Tensor, weight_slots: Tensor, bias_slots: Tensor, segments: Segments, eps: float, out: Tensor
) -> Tensor:
    blocks = segments.device_blocks(rows.device)
    tensors = (rows, weight_slots, bias_slots, out)
    row = (*addresses(blocks, *tensors), *(t.stride(0) for t in tensors), out.shape[1], eps)
    launch("layer_norm", np.array([row], _ARGUMENTS), out, (len(blocks), 1))
    return out
