"""Raw head outputs of a finished request into its result. Plain arithmetic on small arrays, no state."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.entities import find_entities
from runtime.pending import Pending
from runtime.request import ClassifyResult, EmbedResult, RerankResult, ScoreResult, TokenClassifyResult
from vbert.errors import BadRequest

__all__ = ["check_top_n", "classify_result", "embed_result", "rerank_result", "score_result", "token_classify_result"]

Floats = NDArray[np.float32]


def embed_result(done: Pending) -> EmbedResult:
    return EmbedResult(**_common(done), embeddings=_stacked(done))


def classify_result(done: Pending) -> ClassifyResult:
    served, raw = done.served, _stacked(done)
    labels: tuple[str | tuple[str, ...], ...]
    if served.problem == "regression":
        probabilities, labels = raw, ("",) * len(raw)
    elif served.problem == "multi_label":
        probabilities = _sigmoid(raw)
        labels = tuple(tuple(served.labels[c] for c in np.flatnonzero(row >= 0.5)) for row in probabilities)
    else:
        probabilities = _softmax(raw)
        labels = tuple(served.labels[c] for c in raw.argmax(axis=1))
    return ClassifyResult(
        **_common(done),
        labels=labels,
        probabilities=probabilities,
        class_labels=served.labels,
        problem=served.problem,
        exits=tuple(way.exit or None for way in done.ways),
    )


def token_classify_result(done: Pending) -> TokenClassifyResult:
    entities = tuple(
        find_entities(item, encoded, _softmax(_numpy(raw)), done.served.labels)
        for item, encoded, raw in zip(done.inputs, done.encoded, done.outputs, strict=True)
    )
    return TokenClassifyResult(**_common(done), entities=entities)


def score_result(done: Pending) -> ScoreResult:
    return ScoreResult(**_common(done), scores=_scores(done))


def rerank_result(done: Pending, top_n: int | None) -> RerankResult:
    scores = _scores(done)
    order = tuple(int(i) for i in np.argsort(-scores, kind="stable")[:top_n])
    return RerankResult(**_common(done), scores=scores, order=order)


def check_top_n(top_n: Any) -> int | None:
    """Raises BadRequest."""
    if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1):
        raise BadRequest(f"top_n is {top_n!r}; give a whole number above 0, or leave it out", param="top_n")
    return top_n


def _common(done: Pending) -> dict[str, Any]:
    return {
        "tenant": done.served.key.tenant,
        "version": done.served.key.version,
        "timings": done.timings,
        "tokens": tuple(len(e.token_ids) for e in done.encoded),
        "paths": tuple(way.path for way in done.ways),
        "truncated": tuple(len(e.token_ids) < e.full_length for e in done.encoded),
    }


def _numpy(raw: Any) -> Floats:
    array: Floats = raw.numpy()
    return array


def _stacked(done: Pending) -> Floats:
    """[N, C] or [N, D], in the order of the inputs. Not np.stack, which costs ten times as much for one input."""
    return np.concatenate([_numpy(raw) for raw in done.outputs]).reshape(len(done.outputs), -1)


def _scores(done: Pending) -> Floats:
    """[N]: how well each pair goes together, as vbert/tenant.py defines it for rerank heads and classifiers."""
    raw = _stacked(done)
    if raw.shape[1] == 2:
        return _softmax(raw)[:, 1]
    return raw[:, 0] if done.served.problem == "regression" else _sigmoid(raw[:, 0])


def _softmax(raw: Floats) -> Floats:
    exponents: Floats = np.exp(raw - raw.max(axis=-1, keepdims=True))
    exponents /= exponents.sum(axis=-1, keepdims=True)
    return exponents


def _sigmoid(raw: Floats) -> Floats:
    """Written with tanh: the exponential of a large negative logit would overflow."""
    probabilities: Floats = 0.5 + 0.5 * np.tanh(0.5 * raw)
    return probabilities
