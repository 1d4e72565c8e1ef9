"""Sparse deltas in a batch: MaskBert (S = -W * (1 - M)) and Diff pruning. y += x S^T.

Sources: Zhao et al. 2020, arXiv:2004.12406; Guo et al. 2020, arXiv:2012.07463.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from vbert.kernels.segmented_sparse import segmented_sparse
from vbert.peft.use import ClassUse

__all__ = ["add_sparse"]


def add_sparse(uses: Sequence[ClassUse], layer: int, x: Tensor, outs: Mapping[str, Tensor]) -> None:
    """Add the updates of every site in `outs`, all of which read `x` [T, H_in]. outs: site -> [T, H_out], in place."""
    for use in uses:
        for site, out in outs.items():
            if found := use.at(layer, site):
                parts = found[1]
                segmented_sparse(x, parts["row_starts"], parts["columns"], parts["values"], use.segments, out=out)
