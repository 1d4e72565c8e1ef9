"""Low-rank deltas in a batch: LoRA, rsLoRA, AdaLoRA, VeRA and the low-rank part of DoRA. y += (x A) B.

Sources: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732; Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from vbert.kernels.segmented_low_rank import segmented_low_rank
from vbert.peft.use import ClassUse

__all__ = ["add_low_rank"]


def add_low_rank(uses: Sequence[ClassUse], layer: int, x: Tensor, outs: Mapping[str, Tensor]) -> None:
    """Add the updates of every site in `outs`, all of which read `x` [T, H_in]. outs: site -> [T, H_out], in place."""
    for use in uses:
        found = [(use.at(layer, site), out) for site, out in outs.items()]
        sites = [(at[1]["a"], at[1]["b"], out) for at, out in found if at]
        if sites:
            segmented_low_rank(x, sites, use.segments)
