"""The five inference routes: from a checked body to an engine call, from its result to the answer's dict."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np
from aiohttp import web
from numpy.typing import NDArray
from pydantic_core import to_json

from runtime.errors import ComputeFailed
from runtime.http.bodies import ClassifyBody, EmbeddingsBody, InferBody, RerankBody, ScoreBody, TokenClassifyBody
from runtime.http.call import Call
from runtime.http.errors import InvalidValue
from runtime.request import Result, Timings

__all__ = ["classify", "embeddings", "rerank", "score", "token_classify"]

_ROWS_A_TURN = 64  # rows of an answer written between two turns of the event loop: 2 ms of 384 numbers


async def embeddings(call: Call) -> web.Response:
    body: EmbeddingsBody = call.body
    result = await call.engine.embed(body.model, _as_list(body.input), **_terms(call, body))
    width = result.embeddings.shape[1]
    if body.dimensions not in (None, width):
        raise InvalidValue(
            f"dimensions is {body.dimensions} and {body.model} has embeddings of {width}; leave it out or give {width}",
            param="dimensions",
        )
    encode = _base64 if body.encoding_format == "base64" else _json_numbers
    rows = []
    for i, row in enumerate(_finite(result.embeddings)):
        if i and i % _ROWS_A_TURN == 0:
            await asyncio.sleep(0)  # 1,024 rows of 768 take 110 ms: other requests get their turn in between
        rows.append(b'{"object":"embedding","index":%d,"embedding":%b}' % (i, encode(row)))
    return _answer(result, data=b"[" + b",".join(rows) + b"]")


async def classify(call: Call) -> web.Response:
    body: ClassifyBody = call.body
    result = await call.engine.classify(
        body.model, _as_list(body.input), **_terms(call, body), exit_threshold=body.exit_threshold
    )
    has_label = result.problem != "regression"
    rows = [
        {"index": i, "label": label if has_label else None, "probabilities": row, "num_classes": len(row)}
        for i, (label, row) in enumerate(zip(result.labels, _numbers(_finite(result.probabilities)), strict=True))
    ]
    about = {"labels": result.class_labels, "problem": result.problem, "exits": result.exits}
    return _answer(result, data=to_json(rows), **about)


async def token_classify(call: Call) -> web.Response:
    body: TokenClassifyBody = call.body
    result = await call.engine.token_classify(body.model, _as_list(body.input), **_terms(call, body))
    rows = [{"index": i, "entities": found} for i, found in enumerate(result.entities)]
    return _answer(result, data=to_json(rows))


async def rerank(call: Call) -> web.Response:
    body: RerankBody = call.body
    result = await call.engine.rerank(body.model, body.query, body.documents, top_n=body.top_n, **_terms(call, body))
    scores = _numbers(_finite(result.scores))
    return _answer(result, results=[{"index": i, "relevance_score": scores[i]} for i in result.order])


async def score(call: Call) -> web.Response:
    body: ScoreBody = call.body
    result = await call.engine.score(body.model, body.input, **_terms(call, body))
    scores = _numbers(_finite(result.scores))
    rows = [{"object": "score", "index": i, "score": value} for i, value in enumerate(scores)]
    return _answer(result, data=to_json(rows))


def _as_list(value: Any) -> Sequence[Any]:
    """One input, or one list of token ids, becomes a list of one."""
    single = isinstance(value, str) or isinstance(value[0], int)
    return [value] if single else value


def _terms(call: Call, body: InferBody) -> dict[str, Any]:
    return {
        "deadline_s": body.deadline_s,
        "truncate": body.truncate,
        "path": body.path,
        "priority": body.priority,
        "caller": call.key.name,
    }


def _answer(result: Result, *, data: bytes | None = None, **content: Any) -> web.Response:
    """What every answer says, beside `content` and, already in JSON, `data`. The headers are those of TEI and LoRAX."""
    tokens = sum(result.tokens)
    timings = _milliseconds(result.timings)
    common = {
        "object": "list",
        "model": result.tenant,
        "version": result.version,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "timings": timings,
        "truncated": result.truncated,
        "paths": result.paths,
    }
    body = to_json(common | content)
    if data is not None:
        body = body[:-1] + b',"data":' + data + b"}"
    headers = {
        "x-total-time": str(round(timings["total"])),
        "x-tokenization-time": str(round(timings["tokenize"])),
        "x-queue-time": str(round(timings["queue"])),
        "x-load-time": str(round(timings["load"])),
        "x-inference-time": str(round(timings["compute"])),
    }
    return web.Response(body=body, content_type="application/json", headers=headers)


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


def _json_numbers(row: NDArray[np.float32]) -> bytes:
    return to_json(row.tolist())


def _base64(row: NDArray[np.float32]) -> bytes:
    """Little-endian float32 as a JSON string, whatever this machine's order is."""
    return b'"' + b64encode(row.astype("<f4").tobytes()) + b'"'
