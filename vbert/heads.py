"""Task heads: hidden states of a packed batch to one raw answer per sequence, in float32 whatever the encoder's dtype.

Raw means before softmax or sigmoid: logits [C], token logits [n, C], or the pooled, projected, normalised embedding
[D].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vbert.activations import activate
from vbert.tenant import Dense, Head

__all__ = ["run_heads"]


def run_heads(
    hidden: Tensor,
    cu_seqlens: NDArray,  # type: ignore[type-arg]
    heads: Sequence[Head],
    pooler: Dense | None,
) -> list[Tensor]:
    """Apply to each sequence its own head.

    Args:
        hidden: [T, H] last hidden states.  cu_seqlens: [B + 1].  heads: [B]; neighbours with the same head object are
            computed in one product.  pooler: the backbone's own, for heads with `shared_pooler`.
    Returns: per sequence the raw answer, float32, on the host.
    """
    answers: list[Tensor] = []
    first = 0
    for i in range(1, len(heads) + 1):
        if i == len(heads) or heads[i] is not heads[first]:
            answers.extend(_run(hidden, cu_seqlens[first : i + 1].tolist(), heads[first], pooler))
            first = i
    return answers


def _run(hidden: Tensor, bounds: list[int], head: Head, pooler: Dense | None) -> list[Tensor]:
    """The raw answers of neighbouring sequences that share a head. bounds: their row limits."""
    rows = hidden[bounds[0] : bounds[-1]].float()
    lengths = [b - a for a, b in pairwise(bounds)]
    x = _pool(rows, lengths, head.pooling)
    if head.shared_pooler:
        assert pooler is not None  # checked when the tenant was registered
        x = _dense(x, pooler)
    for layer in head.layers:
        x = _dense(x, layer)
    if head.kind == "embed" and head.normalise:
        x = F.normalize(x, dim=1)
    return list(torch.split(x, lengths)) if head.pooling == "none" else list(x.unbind())


def _pool(rows: Tensor, lengths: list[int], pooling: str) -> Tensor:
    """[n, H] rows of some sequences to one row each ([n, H] again for `none`)."""
    if pooling == "none":
        return rows
    if pooling == "cls":
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        return rows.index_select(0, starts.to(rows.device))
    return torch.stack([part.mean(0) for part in torch.split(rows, lengths)])


def _dense(x: Tensor, layer: Dense) -> Tensor:
    return activate(F.linear(x, layer.weight, layer.bias), layer.activation)
