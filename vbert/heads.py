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
from vbert.kernels.mean_rows import mean_rows, unit_rows
from vbert.tenant import Dense, Head

__all__ = ["run_heads"]

_BLOCK_ROWS = 16  # of a sequence whose tokens have a head each
_MOST_COPIED = 1 << 24  # numbers of head weights copied for one product


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

    @cached_property
    def _starts(self) -> Tensor:
        (starts,) = copy_integers([self.bounds[:-1]], self._hidden.device)
        return starts

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
        if self._hidden.is_cpu:
            out = torch.empty(len(self.bounds) - 1, self._hidden.shape[1])
            return mean_rows(self._hidden, self.bounds, out=out)
        rows = torch.arange(self._hidden.shape[0], dtype=self._starts.dtype, device=self._hidden.device)
        return F.embedding_bag(rows, self.tokens, self._starts, mode="mean")


def _same_work(head: Head) -> Hashable:
    """Heads with the same key compute the same; tenants without layers of their own differ in nothing."""
    if head.layers:
        return id(head)
    return head.kind, head.pooling, head.shared_pooler, head.normalise


def _same_shape(head: Head) -> Hashable:
    """Heads with the same key are computed by the same products, each row with its own weights."""
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
        x = _dense_all(x, head)
    else:
        x = _each_with_its_own(x, heads, np.diff(bounds) if head.pooling == "none" else np.ones(len(heads), np.int64))
    if head.kind == "embed" and head.normalise:
        x = unit_rows(x, out=torch.empty_like(x)) if x.is_cpu else F.normalize(x, dim=1)
    return list(torch.split(x, np.diff(bounds).tolist())) if head.pooling == "none" else list(x.unbind())


def _each_with_its_own(x: Tensor, heads: Sequence[Head], counts: NDArray[np.int64]) -> Tensor:
    """The layers of several heads of one shape: the first counts[0] rows of x [n, H] through those of heads[0], ...

    The number of products does not grow with that of the heads: rows of a sequence go in blocks of equal height, the
    last one filled up. Each block takes a copy of its weights; where those are too large, every head has its products.
    """
    distinct = list({id(head): head for head in heads}.values())
    order = {id(head): i for i, head in enumerate(distinct)}
    height = int(min(_BLOCK_ROWS, counts.max()))
    blocks = -(-counts // height)
    if int(blocks.sum()) * max(layer.weight.numel() for layer in heads[0].layers) > _MOST_COPIED:
        parts = torch.split(x, counts.tolist())
        return torch.cat([_dense_all(part, head) for part, head in zip(parts, heads, strict=True)])
    owner = np.repeat([order[id(head)] for head in heads], blocks)
    place = np.arange(counts.sum()) + np.repeat(np.cumsum(blocks * height) - blocks * height, counts)
    place -= np.repeat(np.cumsum(counts) - counts, counts)  # where each row lies in the blocks
    source = np.zeros(len(owner) * height, np.int64)
    source[place] = np.arange(counts.sum())
    mine, into, back = copy_integers([owner, source, place], x.device)
    x = x.index_select(0, into).view(len(owner), height, -1)
    for k in range(len(heads[0].layers)):
        layers = [head.layers[k] for head in distinct]
        weight = torch.stack([layer.weight for layer in layers]).index_select(0, mine)  # [blocks, out, in]
        y = x @ weight.transpose(1, 2)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if biases:
            y = y + torch.stack(biases).index_select(0, mine).unsqueeze(1)
        x = activate(y, layers[0].activation)
    return x.flatten(0, 1).index_select(0, back)


def _dense_all(x: Tensor, head: Head) -> Tensor:
    for layer in head.layers:
        x = _dense(x, layer)
    return x


def _dense(x: Tensor, layer: Dense) -> Tensor:
    return activate(F.linear(x, layer.weight, layer.bias), layer.activation)
