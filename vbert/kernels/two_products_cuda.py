"""The CUDA kernels behind low rank and bottleneck: out += act(x A + a) B + b, one launch for all sites that read x.

float32 runs `csrc/two_products_32.cu`; float16 and bfloat16 run `csrc/two_products_16.cu` on the tensor cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vbert.batch import Segments
from vbert.kernels.cuda import address, addresses, describe, launch
from vbert.kernels.two_products import ACTIVATION_CODES

__all__ = ["SiteProducts", "launch_two_products"]

_MAX_SITES = 3  # q, k and v; the size of an array in csrc/two_products.cuh
_RANKS_AT_ONCE = 64  # more are done in turns, each of which reads x again
_SITE = describe(
    **dict.fromkeys(("down", "up", "narrow_bias", "wide_bias", "out"), "p"),
    **dict.fromkeys(("down_stride", "up_stride", "narrow_bias_stride", "wide_bias_stride", "out_stride"), "l"),
    **dict.fromkeys(("rank", "width_out"), "i"),
)
_HEAD = describe(blocks="p", x="p", x_stride="l", width_in="i", activation="i", shared_bytes="i")
_ARGUMENTS = np.dtype([*((n, _HEAD[n]) for n in _HEAD.names or ()), ("sites", _SITE, (_MAX_SITES,))], align=True)


@dataclass(frozen=True, slots=True)
class SiteProducts:
    """down [P, H_in, R], up [P, R, H_out], out [T, H_out]; biases [P, R] and [P, H_out] or None."""

    down: Tensor
    up: Tensor
    out: Tensor
    narrow_bias: Tensor | None = None
    wide_bias: Tensor | None = None

    def row(self, hidden: Tensor) -> tuple[int, ...]:
        """The fields of a `Site` in csrc/two_products.cuh, all in the dtype of `hidden`."""
        parts = (self.down, self.up, self.narrow_bias, self.wide_bias, self.out)
        strides = (0 if part is None else part.stride(0) for part in parts)
        return (*addresses(*parts, hidden)[:-1], *strides, self.down.shape[2], self.out.shape[1])


def launch_two_products(
    hidden: Tensor, sites: Sequence[SiteProducts], segments: Segments, *, activation: str = "identity"
) -> None:
    """out[i:j] += act(hidden[i:j] @ down[p] + narrow_bias[p]) @ up[p] + wide_bias[p] at every site.

    hidden: [T, H_in], float32, float16 or bfloat16 as all the rest is; may be the `out` of a single site.
    """
    rank = max(site.down.shape[2] for site in sites)
    if rank > _RANKS_AT_ONCE and any(_share_memory(hidden, site.out) for site in sites):
        hidden = hidden.clone()  # later ranks read what the first ones have written
    if hidden.dtype == torch.float32:
        file, kernel, shared_bytes = "two_products_32", "two_products_32", 96 << 10
    elif rank <= 16:
        file, kernel, shared_bytes = "two_products_16", "two_products_16", 40 << 10
    else:
        file, kernel, shared_bytes = "two_products_16", "two_products_64", 96 << 10
    blocks = segments.device_blocks(hidden.device)
    code, width_in = ACTIVATION_CODES[activation], hidden.shape[1]
    for first in range(0, len(sites), _MAX_SITES):
        group = sites[first : first + _MAX_SITES]
        arguments = np.zeros(1, _ARGUMENTS)
        arguments["blocks"], arguments["x"], arguments["x_stride"] = address(blocks), address(hidden), hidden.stride(0)
        arguments["width_in"], arguments["activation"], arguments["shared_bytes"] = width_in, code, shared_bytes
        for i, site in enumerate(group):
            arguments["sites"][0, i] = site.row(hidden)
        grid = len(blocks), len(group)
        launch(kernel, arguments, group[0].out, grid, file=file, shared_bytes=shared_bytes)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
