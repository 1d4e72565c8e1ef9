"""Task heads: hidden states of a packed batch to one raw answer per sequence, in float32 whatever the encoder's dtype.

Raw means before softmax or sigmoid: logits [C], token logits [n, C], or the pooled, projected, normalised embedding
[D].
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vbert.activations import activate
from vbert.batch import copy_integers
from vbert.tenant import Dense, Head

__all__ = ["run_heads"]


def run_heads(
    hidden: Tensor, cu_seqlens: NDArray[np.int64], heads: Sequence[Head], pooler: Dense | None
) -> list[Tensor]:
    """Apply to each sequence its own head.

    Args:
        hidden: [T, H] last hidden states.  cu_seqlens: [B + 1].  heads: [B]; neighbours that compute the same are
            computed together.  pooler: the backbone's own, for heads with `shared_pooler`.
            The weights of heads and pooler are where `hidden` is.
    Returns: per sequence the raw answer, float32, where `hidden` is.
    """
    pooled = _Pooled(hidden, cu_seqlens)
    answers: list[Tensor] = []
    # On a GPU a launch costs more than the products of a head: neighbours of one shape share theirs.
    key = _same_shape if hidden.is_cuda else _same_work
    for _, group in groupby(range(len(heads)), key=lambda i: key(heads[i])):
        members = list(group)
        first, last = members[0], members[-1] + 1
        answers.extend(_run(pooled, first, last, heads[first:last], pooler))
    return answers


class _Pooled:
    """The rows of a batch by pooling, in float32, each made when the first head asks."""

    def __init__(self, hidden: Tensor, cu_seqlens: NDArray[np.int64]) -> None:
        self._hidden, self.bounds = hidden, cu_seqlens
        (self._starts,) = copy_integers([cu_seqlens[:-1]], hidden.device)

    @cached_property
    def tokens(self) -> Tensor:
        """[T, H]."""
        return self._hidden.float()

    @cached_property
    def cls(self) -> Tensor:
        """[B, H]: the first token of each sequence."""
        return self._hidden.index_select(0, self._starts).float()

    @cached_property
    def mean(self) -> Tensor:
        """[B, H]: over all tokens of each sequence, special ones included."""
        rows = torch.arange(self._hidden.shape[0], dtype=self._starts.dtype, device=self._hidden.device)
        return F.embedding_bag(rows, self.tokens, self._starts, mode="mean")


def _same_work(head: Head) -> Hashable:
    """Heads with the same key compute the same; tenants without layers of their own differ in nothing."""
    if head.layers:
        return id(head)
    return head.kind, head.pooling, head.shared_pooler, head.normalise


def _same_shape(head: Head) -> Hashable:
    """Heads with the same key are computed by the same products, each row with its own weights."""
    if head.pooling == "none":
        return id(head)
    layers = tuple((layer.weight.shape, layer.bias is None, layer.activation) for layer in head.layers)
    return head.kind, head.pooling, head.shared_pooler, head.normalise, layers


def _run(pooled: _Pooled, first: int, last: int, heads: Sequence[Head], pooler: Dense | None) -> list[Tensor]:
    """The raw answers of sequences first <= i < last, whose heads do the same work or have the same shape."""
    head, bounds = heads[0], pooled.bounds[first : last + 1].tolist()
    x = pooled.tokens[bounds[0] : bounds[-1]] if head.pooling == "none" else getattr(pooled, head.pooling)[first:last]
    if head.shared_pooler:
        assert pooler is not None  # checked when the tenant was registered
        x = _dense(x, pooler)
    if not head.layers or all(other is head for other in heads):
        for layer in head.layers:
            x = _dense(x, layer)
    else:
        x = _each_with_its_own(x, heads)
    if head.kind == "embed" and head.normalise:
        x = F.normalize(x, dim=1)
    return list(torch.split(x, np.diff(bounds).tolist())) if head.pooling == "none" else list(x.unbind())


def _each_with_its_own(x: Tensor, heads: Sequence[Head]) -> Tensor:
    """The layers of several heads of one shape: row i of x [n, H] through those of heads[i]."""
    distinct = list({id(head): head for head in heads}.values())
    order = {id(head): i for i, head in enumerate(distinct)}
    (mine,) = copy_integers([np.array([order[id(head)] for head in heads])], x.device)
    for k in range(len(heads[0].layers)):
        layers = [head.layers[k] for head in distinct]
        weight = torch.stack([layer.weight for layer in layers]).index_select(0, mine)  # [n, out, in]
        y = torch.bmm(weight, x.unsqueeze(2)).squeeze(2)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if biases:
            y = y + torch.stack(biases).index_select(0, mine)
        x = activate(y, layers[0].activation)
    return x


def _dense(x: Tensor, layer: Dense) -> Tensor:
    return activate(F.linear(x, layer.weight, layer.bias), layer.activation)
