"""The five inference routes: from a checked body to an engine call, from its result to the answer's dict."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from runtime.errors import ComputeFailed
from runtime.http.bodies import ClassifyBody, EmbeddingsBody, InferBody, RerankBody, ScoreBody, TokenClassifyBody
from runtime.http.call import Call, json_response
from runtime.http.errors import InvalidValue
from runtime.request import Result, Timings

__all__ = ["classify", "embeddings", "rerank", "score", "token_classify"]


async def embeddings(call: Call) -> web.Response:
    body: EmbeddingsBody = call.body
    result = await call.engine.embed(body.model, _as_list(body.input), **_terms(call, body))
    width = result.embeddings.shape[1]
    if body.dimensions not in (None, width):
        raise InvalidValue(
            f"dimensions is {body.dimensions} and {body.model} has embeddings of {width}; leave it out or give {width}",
            param="dimensions",
        )
    encode = _base64 if body.encoding_format == "base64" else _numbers
    rows = [
        {"object": "embedding", "index": i, "embedding": row}
        for i, row in enumerate(encode(_finite(result.embeddings)))
    ]
    return _answer(result, data=rows)


async def classify(call: Call) -> web.Response:
    body: ClassifyBody = call.body
    result = await call.engine.classify(body.model, _as_list(body.input), **_terms(call, body))
    has_label = result.problem != "regression"
    rows = [
        {"index": i, "label": label if has_label else None, "probabilities": row, "num_classes": len(row)}
        for i, (label, row) in enumerate(zip(result.labels, _numbers(_finite(result.probabilities)), strict=True))
    ]
    return _answer(result, data=rows, labels=result.class_labels, problem=result.problem)


async def token_classify(call: Call) -> web.Response:
    body: TokenClassifyBody = call.body
    result = await call.engine.token_classify(body.model, _as_list(body.input), **_terms(call, body))
    return _answer(result, data=[{"index": i, "entities": found} for i, found in enumerate(result.entities)])


async def rerank(call: Call) -> web.Response:
    body: RerankBody = call.body
    result = await call.engine.rerank(body.model, body.query, body.documents, top_n=body.top_n, **_terms(call, body))
    scores = _numbers(_finite(result.scores))
    return _answer(result, results=[{"index": i, "relevance_score": scores[i]} for i in result.order])


async def score(call: Call) -> web.Response:
    body: ScoreBody = call.body
    result = await call.engine.score(body.model, body.input, **_terms(call, body))
    scores = _numbers(_finite(result.scores))
    return _answer(result, data=[{"object": "score", "index": i, "score": value} for i, value in enumerate(scores)])


def _as_list(value: Any) -> Sequence[Any]:
    """One input, or one list of token ids, becomes a list of one."""
    single = isinstance(value, str) or isinstance(value[0], int)
    return [value] if single else value


def _terms(call: Call, body: InferBody) -> dict[str, Any]:
    return {"deadline_s": body.deadline_s, "truncate": body.truncate, "caller": call.key.name}


def _answer(result: Result, **content: Any) -> web.Response:
    """What every answer says beside its `content`. The headers are those of TEI and LoRAX, in whole milliseconds."""
    tokens = sum(result.tokens)
    timings = _milliseconds(result.timings)
    common = {
        "object": "list",
        "model": result.tenant,
        "version": result.version,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "timings": timings,
        "truncated": result.truncated,
    }
    headers = {
        "x-total-time": str(round(timings["total"])),
        "x-tokenization-time": str(round(timings["tokenize"])),
        "x-queue-time": str(round(timings["queue"])),
        "x-load-time": str(round(timings["load"])),
        "x-inference-time": str(round(timings["compute"])),
    }
    return json_response(common | content, headers=headers)


def _milliseconds(timings: Timings) -> dict[str, float]:
    return {
        stage: round(getattr(timings, f"{stage}_s") * 1000, 3)
        for stage in ("tokenize", "queue", "load", "compute", "total")
    }


def _finite(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """JSON has no NaN and no infinity; an answer that holds one is a failure, not a null."""
    if not np.isfinite(array).all():
        raise ComputeFailed("the answer holds numbers that are not finite")
    return array


def _numbers(array: NDArray[np.float32]) -> list[Any]:
    numbers: list[Any] = array.tolist()
    return numbers


def _base64(array: NDArray[np.float32]) -> list[str]:
    """Rows as little-endian float32, whatever this machine's order is."""
    return [b64encode(row).decode("ascii") for row in np.ascontiguousarray(array, dtype="<f4")]
