"""Operator: each tenant's bottleneck adapter on its own rows of a packed batch."""

from __future__ import annotations

import torch
from torch import Tensor

from vbert.activations import activate
from vbert.batch import Segments
from vbert.errors import ShapeError
from vbert.kernels.backend import Backend, pick
from vbert.kernels.two_products import add_two_products
from vbert.kernels.two_products_cuda import SiteProducts, launch_two_products

__all__ = ["segmented_bottleneck"]


def segmented_bottleneck(
    hidden: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    segments: Segments,
    *,
    activation: str,
    out: Tensor,
    backend: Backend | None = None,
) -> Tensor:
    """Add each tenant's bottleneck output to its own rows.

    For segment s with rows i:j and slot p: out[i:j] += act(hidden[i:j] @ down[p] + down_bias[p]) @ up[p] + up_bias[p]

    Args:
        hidden: [T, H] float32 or bfloat16, on a GPU also float16; may be `out` itself.  out: [T, H], updated in place.
        down: [P, H, R], down_bias: [P, R], up: [P, R, H], up_bias: [P, H]: strided views of the arena.
    Returns: `out`. Raises: ShapeError, KernelUnavailable.
    Source: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2007.07779; He et al. 2021,
    arXiv:2110.04366.
    """
    if down.shape[1] != hidden.shape[1] or up.shape[1:] != (down.shape[2], out.shape[1]):
        raise ShapeError(
            f"down {list(down.shape)} and up {list(up.shape)} do not fit {list(hidden.shape)} -> {list(out.shape)}"
        )
    chosen = pick(backend, hidden)
    if chosen is Backend.REFERENCE:
        return reference(hidden, down, down_bias, up, up_bias, segments, activation, out)
    if chosen is Backend.CUDA:
        site = SiteProducts(down, up, out, down_bias, up_bias)
        launch_two_products(hidden, [site], segments, activation=activation)
        return out
    if len(segments) == 1:  # plain products on views are faster than batches of products
        slot, rows = segments.only
        narrow = activate(torch.addmm(down_bias[slot], hidden[rows], down[slot]), activation)
        out[rows].addmm_(narrow, up[slot]).add_(up_bias[slot])
        return out
    if hidden.dtype == torch.float32:
        add_two_products(hidden, down, up, segments, out=out, biases=(down_bias, up_bias), activation=activation)
        return out
    narrow_bias, wide_bias = segments.gather(down_bias).unsqueeze(1), segments.gather(up_bias).unsqueeze(1)
    narrow = activate(torch.baddbmm(narrow_bias, segments.take(hidden), segments.gather(down)), activation)
    update = torch.baddbmm(wide_bias, narrow, segments.gather(up))
    segments.add_(out, update)
    return out


def reference(
    hidden: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    segments: Segments,
    activation: str,
    out: Tensor,
) -> Tensor:
    for p, i, j in zip(segments.slot, segments.start, segments.stop, strict=True):
        narrow = activate(hidden[i:j].float() @ down[p].float() + down_bias[p].float(), activation)
        out[i:j] += (narrow @ up[p].float() + up_bias[p].float()).to(out.dtype)
    return out
