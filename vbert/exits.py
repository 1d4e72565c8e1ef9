"""Early exit: an answer that is sure enough before a layer leaves the batch there, and the others go on without it.

The heads that judge are the tenant's own (`vbert.tenant.Exit`), trained with it. Source of the idea: BranchyNet,
Teerapittayanon et al. 2017, arXiv:1709.01686; for BERT: DeeBERT, Xin et al. 2020, arXiv:2004.12993.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from vbert.heads import run_heads
from vbert.packing import PackedBatch
from vbert.tenant import Head

__all__ = ["Left", "confidences", "leave", "rows_of", "staying"]

Left = dict[int, tuple[int, Tensor]]  # by place in what `pack` was given: the layer before which it left, its answer


def leave(layer: int, hidden: Tensor, batch: PackedBatch, places: Sequence[int], left: Left) -> None:
    """Add to `left` those of a batch that leave before a layer. hidden: [T, H], what enters it. places: [B], of each
    packed sequence in what `pack` was given."""
    asked = [j for j in batch.exits[layer] if places[j] not in left]
    heads = [next(each.head for each in batch.sequences[j].exits if each.layer == layer) for j in asked]
    if not asked:
        return
    bounds = batch.rows.cu_seqlens
    if len(asked) < len(batch.order):
        hidden = hidden.index_select(0, rows_of(batch, asked).to(hidden.device))
        bounds = np.concatenate([[0], np.cumsum(np.diff(bounds)[asked])])
    answers = run_heads(hidden, bounds, heads, None)
    for j, answer, confidence in zip(asked, answers, confidences(answers, heads), strict=True):
        if confidence > batch.sequences[j].exit_above:
            left[places[j]] = layer, answer


def staying(batch: PackedBatch, left: Left) -> list[int]:
    """Packed positions of those that did not leave."""
    return [j for j, place in enumerate(batch.order) if place not in left]


def rows_of(batch: PackedBatch, chosen: Sequence[int]) -> Tensor:
    """[n] int64: the rows of the sequences at these packed positions, ascending."""
    bounds = batch.rows.cu_seqlens
    parts = [np.arange(bounds[j], bounds[j + 1]) for j in chosen]
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]))


def confidences(answers: Sequence[Tensor], heads: Sequence[Head]) -> list[float]:
    """Of the raw answers [C] of classifiers: the probability of the best label; for multi_label that of the least sure
    label, of being there or of not being there. Waits for a GPU."""
    found: list[float] = []
    pairs = zip(answers, heads, strict=True)
    for (problem, _), group in groupby(pairs, key=lambda pair: (pair[1].problem, len(pair[0]))):
        raw = torch.stack([answer for answer, _ in group])
        sure = torch.sigmoid(raw.abs()).amin(1) if problem == "multi_label" else raw.softmax(1).amax(1)
        found += sure.tolist()
    return found
