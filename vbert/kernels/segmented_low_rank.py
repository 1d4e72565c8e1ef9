"""Operator: each tenant's low-rank update of its own rows of a packed batch."""

from __future__ import annotations

import torch
from torch import Tensor

from vbert.batch import Segments
from vbert.errors import ShapeError
from vbert.kernels.backend import Backend, pick
from vbert.kernels.two_products import add_two_products

__all__ = ["segmented_low_rank"]


def segmented_low_rank(
    hidden: Tensor,
    a_slots: Tensor,
    b_slots: Tensor,
    segments: Segments,
    *,
    out: Tensor,
    chunks: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Add each tenant's low-rank update to its own rows.

    For segment s with rows i:j and slot p: out[i:j] += hidden[i:j] @ a_slots[p] @ b_slots[p]

    Args:
        hidden: [T, H_in] float32 or bfloat16.  out: [T, H_out], may be columns of a wider tensor, updated in place.
        a_slots: [P, H_in, R], b_slots: [P, R, H_out]: strided views of the arena, the dtype of `hidden`.
        segments: rows and slots of the tenants of this arena class.
        chunks: `segments.take(hidden)` in bfloat16, when several sites read the same rows.
    Returns: `out`. Raises: ShapeError, KernelUnavailable.
    Source: Hu et al. 2021, arXiv:2106.09685; batched form, Chen et al. 2023, arXiv:2310.18547.
    """
    rank = a_slots.shape[2]
    if a_slots.shape[1] != hidden.shape[1] or b_slots.shape[1:] != (rank, out.shape[1]):
        raise ShapeError(
            f"a {list(a_slots.shape)} and b {list(b_slots.shape)} do not fit {list(hidden.shape)} -> {list(out.shape)}"
        )
    if pick(backend, hidden) is Backend.REFERENCE:
        return reference(hidden, a_slots, b_slots, segments, out)
    if hidden.dtype == torch.float32:
        add_two_products(hidden, a_slots, b_slots, segments, out=out)
    else:
        _batched(segments.take(hidden) if chunks is None else chunks, a_slots, b_slots, segments, out)
    return out


def reference(hidden: Tensor, a_slots: Tensor, b_slots: Tensor, segments: Segments, out: Tensor) -> Tensor:
    for p, i, j in zip(segments.slot, segments.start, segments.stop, strict=True):
        out[i:j] += (hidden[i:j].float() @ a_slots[p].float() @ b_slots[p].float()).to(out.dtype)
    return out


def _batched(chunks: Tensor, a_slots: Tensor, b_slots: Tensor, segments: Segments, out: Tensor) -> None:
    # bfloat16 needs the matrix unit, which batched products over equal chunks reach. Gathering the slots copies 2 H R
    # numbers a chunk, which is less than its rows.
    segments.add_(out, torch.bmm(torch.bmm(chunks, segments.gather(a_slots)), segments.gather(b_slots)))
