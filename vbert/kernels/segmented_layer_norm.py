"""Operator: each tenant's own LayerNorm over its rows of a packed batch."""

from __future__ import annotations

import numba
import numpy as np
import torch.nn.functional as F
from torch import Tensor

from vbert.batch import Segments
from vbert.errors import ShapeError
from vbert.kernels.backend import Backend, pick
from vbert.kernels.bf16 import as_array, load, store

__all__ = ["segmented_layer_norm"]


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
        rows, out: [T, H] float32 or bfloat16.  weight_slots, bias_slots: [P, H] strided views of the arena.
    Returns: `out`. Raises: ShapeError, KernelUnavailable.
    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    if weight_slots.shape[1] != rows.shape[1] or bias_slots.shape[1] != rows.shape[1] or rows.shape != out.shape:
        raise ShapeError(f"weight {list(weight_slots.shape)} does not fit {list(rows.shape)} -> {list(out.shape)}")
    if pick(backend, rows) is Backend.REFERENCE:
        return reference(rows, weight_slots, bias_slots, segments, eps, out)
    weight, bias = as_array(weight_slots), as_array(bias_slots)
    _cpu(as_array(rows), weight, bias, segments.rows.numpy(), segments.row_slots, np.float32(eps), as_array(out))
    return out


def reference(
    rows: Tensor, weight_slots: Tensor, bias_slots: Tensor, segments: Segments, eps: float, out: Tensor
) -> Tensor:
    for p, i, j in zip(segments.slot, segments.start, segments.stop, strict=True):
        weight, bias = weight_slots[p].float(), bias_slots[p].float()
        out[i:j] = F.layer_norm(rows[i:j].float(), (rows.shape[1],), weight, bias, eps).to(out.dtype)
    return out


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _cpu(rows, weight, bias, row_of, slot_of, eps, out):  # type: ignore[no-untyped-def]
    width = rows.shape[1]
    for n in numba.prange(len(row_of)):
        t, p = row_of[n], slot_of[n]
        total = np.float32(0.0)
        for h in range(width):
            total += load(rows[t, h])
        mean = total / np.float32(width)
        squares = np.float32(0.0)
        for h in range(width):
            centred = load(rows[t, h]) - mean
            squares += centred * centred
        inverse = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        for h in range(width):
            store(out, t, h, (load(rows[t, h]) - mean) * inverse * load(weight[p, h]) + load(bias[p, h]))
