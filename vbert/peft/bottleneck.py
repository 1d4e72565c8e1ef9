"""Bottleneck deltas in a batch: Houlsby, Pfeiffer, parallel and vBERT adapters. out += act(in D + d) U + e.

Sources: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2007.07779; He et al. 2021,
arXiv:2110.04366.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vbert.kernels.segmented_bottleneck import segmented_bottleneck
from vbert.peft.use import ClassUse

__all__ = ["add_bottleneck"]


def add_bottleneck(uses: Sequence[ClassUse], layer: int, site: str, tap: Tensor, out: Tensor) -> None:
    """Add the bottlenecks of one site that read `tap` [T, H] into `out` [T, H]; the two may be the same tensor."""
    for use in uses:
        if found := use.at(layer, site):
            activation, parts = found
            tensors = (parts["down"], parts["down_bias"], parts["up"], parts["up_bias"])
            segmented_bottleneck(tap, *tensors, use.segments, activation=activation, out=out)
