"""Low-rank deltas in a batch: LoRA, rsLoRA, AdaLoRA, VeRA and the low-rank part of DoRA. y += (x A) B.

Sources: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732; Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vbert.kernels.segmented_low_rank import segmented_low_rank
from vbert.peft.use import ClassUse

__all__ = ["add_low_rank"]


def add_low_rank(uses: Sequence[ClassUse], layer: int, x: Tensor, outs: Mapping[str, Tensor]) -> None:
    """Add the updates of every site in `outs`, all of which read `x` [T, H_in]. outs: site -> [T, H_out], in place."""
    for use in uses:
        chunks = None
        for site, out in outs.items():
            if found := use.at(layer, site):
                if chunks is None and x.dtype == torch.bfloat16:  # float32 kernels read the rows in place
                    chunks = use.segments.take(x)
                _, parts = found
                segmented_low_rank(x, parts["a"], parts["b"], use.segments, out=out, chunks=chunks)
