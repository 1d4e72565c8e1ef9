"""How near the answers of two tenants are, over texts: of a compressed one, say, and the whole model it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.progress import Progress, silent
from vbert.formats.transformers_folder import Backbone
from vbert.reference import dense_forward
from vbert.tenant import Head, TenantModule
from vbert.tokenizer import Encoded

__all__ = ["compare_answers"]

Side = tuple[Backbone, TenantModule]


def compare_answers(ours: Side, theirs: Side, inputs: Sequence[Encoded], progress: Progress = silent) -> dict[str, Any]:
    """By the dense reference, one text at a time. Both have heads of one shape.

    Returns: texts; of classifiers and taggers same_label, the share of texts (tokens) with the same best label, and
    probability_mean, probability_max, by how much probabilities differ; of embeddings cosine_mean and cosine_min; of
    regressions number_mean and number_max, by how much they differ.
    """
    head = theirs[1].head
    pairs = []
    for done, encoded in enumerate(inputs, 1):
        ids, types = torch.tensor(encoded.token_ids), torch.tensor(encoded.type_ids)
        pairs.append(tuple(dense_forward(backbone, module, ids, types) for backbone, module in (ours, theirs)))
        progress("comparing answers", done, len(inputs))
    a, b = (torch.cat([pair[i].reshape(-1, pair[i].shape[-1]) for pair in pairs]) for i in (0, 1))
    return {"texts": len(inputs)} | _nearness(head, a, b)


def _nearness(head: Head, a: Tensor, b: Tensor) -> dict[str, float]:
    """a, b: [N, C] raw outputs of the head, [N, D] of embeddings."""
    if head.kind == "embed":
        cosine = F.cosine_similarity(a, b)
        return {"cosine_mean": _rounded(cosine.mean()), "cosine_min": _rounded(cosine.min())}
    if head.problem == "regression":
        apart = (a - b).abs()
        return {"number_mean": _rounded(apart.mean()), "number_max": _rounded(apart.max())}
    if head.problem == "multi_label":
        same, apart = ((a > 0) == (b > 0)).float().mean(), (a.sigmoid() - b.sigmoid()).abs()
    else:
        same, apart = (a.argmax(-1) == b.argmax(-1)).float().mean(), (a.softmax(-1) - b.softmax(-1)).abs()
    return {
        "same_label": _rounded(same),
        "probability_mean": _rounded(apart.mean()),
        "probability_max": _rounded(apart.max()),
    }


def _rounded(value: Tensor) -> float:
    return round(float(value), 6)
