"""Operator: each tenant's low-rank updates of its own rows of a packed batch, at all sites that read the same rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vbert.batch import Segments
from vbert.errors import ShapeError
from vbert.kernels.backend import Backend, pick
from vbert.kernels.two_products import add_two_products
from vbert.kernels.two_products_cuda import SiteProducts, launch_two_products

__all__ = ["LowRankSite", "segmented_low_rank"]

LowRankSite = tuple[Tensor, Tensor, Tensor]  # a_slots, b_slots, out

_FEW = 2**18  # multiplications; for fewer, setting out for the matrix unit takes longer than float32 takes in all


def segmented_low_rank(
    hidden: Tensor, sites: Sequence[LowRankSite], segments: Segments, *, backend: Backend | None = None
) -> None:
    """Add each tenant's low-rank update to its own rows, at each site, in place.

    For segment s with rows i:j and slot p: out[i:j] += hidden[i:j] @ a_slots[p] @ b_slots[p]

    Args:
        hidden: [T, H_in] float32 or bfloat16, on a GPU also float16.
        sites: of each (a_slots [P, H_in, R], b_slots [P, R, H_out], out [T, H_out]): slots are strided views of the
            arena in the dtype of `hidden`, ranks may differ; `out` may be columns of a wider tensor.
        segments: rows and slots of the tenants of this arena class.
    Raises: ShapeError, KernelUnavailable.
    Source: Hu et al. 2021, arXiv:2106.09685; batched form, Chen et al. 2023, arXiv:2310.18547.
    """
    for a, b, out in sites:
        if a.shape[1] != hidden.shape[1] or b.shape[1:] != (a.shape[2], out.shape[1]):
            raise ShapeError(
                f"a {list(a.shape)} and b {list(b.shape)} do not fit {list(hidden.shape)} -> {list(out.shape)}"
            )
    chosen = pick(backend, hidden)
    if chosen is Backend.REFERENCE:
        reference(hidden, sites, segments)
    elif chosen is Backend.CUDA:
        launch_two_products(hidden, [SiteProducts(a, b, out) for a, b, out in sites], segments)
    elif len(segments) == 1:
        _alone(hidden, sites, segments)
    elif hidden.dtype == torch.float32:
        for a, b, out in sites:
            add_two_products(hidden, a, b, segments, out=out)
    else:
        _batched(hidden, sites, segments)


def reference(hidden: Tensor, sites: Sequence[LowRankSite], segments: Segments) -> None:
    for a, b, out in sites:
        for p, i, j in zip(segments.slot, segments.start, segments.stop, strict=True):
            out[i:j] += (hidden[i:j].float() @ a[p].float() @ b[p].float()).to(out.dtype)


def _alone(hidden: Tensor, sites: Sequence[LowRankSite], segments: Segments) -> None:
    # Of one tenant, plain products on views take a quarter to three quarters of what batches of products take.
    slot, rows = segments.only
    own = hidden[rows]
    for a, b, out in sites:
        if hidden.dtype != torch.float32 and len(own) * a.shape[2] * (a.shape[1] + b.shape[2]) <= _FEW:
            out[rows].add_(own.float() @ a[slot].float() @ b[slot].float())
        else:
            out[rows].addmm_(own @ a[slot], b[slot])


def _batched(hidden: Tensor, sites: Sequence[LowRankSite], segments: Segments) -> None:
    # bfloat16 needs the matrix unit, which batched products over equal chunks reach. Gathering the slots copies 2 H R
    # numbers a chunk, which is less than its rows.
    chunks = segments.take(hidden)
    for a, b, out in sites:
        segments.add_(out, torch.bmm(torch.bmm(chunks, segments.gather(a)), segments.gather(b)))
