"""Checks on the inputs of one request before they cost anything. Pure: types, counts and sizes, no tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from runtime.errors import RequestTooLarge
from runtime.request import Input, Served
from vbert.errors import BadRequest, WrongTask

__all__ = ["as_pairs", "check_inputs", "check_method", "in_chunks", "num_chars"]

_CHUNK_CHARS = 50_000  # about 10 ms of tokenising: what one request may hold the tokenizer thread for at a time


def check_method(served: Served, method: str) -> None:
    """Raises WrongTask, naming what the tenant does serve."""
    if method not in served.methods:
        raise WrongTask(
            f"{served.key.tenant!r} serves {' and '.join(served.methods)}, not {method}; use another model or method",
            param="model",
        )


def check_inputs(inputs: Any, method: str, *, max_inputs: int, max_chars: int) -> int:
    """Code points of all inputs. Raises BadRequest (wrong type, none, empty), RequestTooLarge (too many, too long)."""
    if isinstance(inputs, str) or not isinstance(inputs, Sequence):
        raise BadRequest(f"the input is of type {type(inputs).__name__}; send a list of inputs", param="input")
    if not inputs:
        raise BadRequest("the list of inputs is empty; send at least one", param="input")
    if len(inputs) > max_inputs:
        raise RequestTooLarge(f"{len(inputs)} inputs, the limit is {max_inputs}; send fewer at once", param="input")
    return sum(_check_input(i, item, method, max_chars) for i, item in enumerate(inputs))


def as_pairs(query: Any, documents: Any) -> list[tuple[str, str]]:
    """A query beside each document. Raises BadRequest."""
    if not isinstance(query, str):
        raise BadRequest(f"the query is of type {type(query).__name__}; send one text", param="query")
    if isinstance(documents, str) or not isinstance(documents, Sequence) or not documents:
        raise BadRequest("documents must be a list of at least one text", param="documents")
    if bad := [i for i, document in enumerate(documents) if not isinstance(document, str)]:
        raise BadRequest(
            f"document {bad[0]} is of type {type(documents[bad[0]]).__name__}; send texts", param="documents"
        )
    return [(query, document) for document in documents]


def num_chars(item: Input) -> int:
    """Code points of a text, a pair or a list of words; a token id counts as a word of four."""
    if isinstance(item, str):
        return len(item)
    if item and isinstance(item[0], int):
        return 4 * len(item)
    return sum(len(part) if isinstance(part, str) else 4 for part in item)


def in_chunks(inputs: Sequence[Input]) -> Iterator[list[Input]]:
    """The inputs in order, in pieces of at most about `_CHUNK_CHARS`, at least one input each."""
    chunk: list[Input] = []
    chars = 0
    for item in inputs:
        size = num_chars(item)
        if chunk and chars + size > _CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
        chunk.append(item)
        chars += size
    yield chunk


def _check_input(i: int, item: Any, method: str, max_chars: int) -> int:
    if isinstance(item, bytes | bytearray) or not isinstance(item, str | Sequence):
        raise BadRequest(f"input {i} is of type {type(item).__name__}; send a text, a pair or a list", param="input")
    pair = isinstance(item, tuple)
    if pair and (len(item) != 2 or not all(isinstance(part, str) for part in item)):
        raise BadRequest(f"input {i} is a tuple that is not two texts; send (first, second)", param="input")
    if method in ("rerank", "score") and not pair:
        raise BadRequest(f"input {i} is not a pair; {method} compares two texts", param="input")
    if method == "token_classify" and (pair or not (isinstance(item, str) or _is_words(item))):
        raise BadRequest(f"input {i} is no text; token_classify takes a text or a list of words", param="input")
    if not item or (isinstance(item, str) and not item.strip()) or (pair and not all(p.strip() for p in item)):
        raise BadRequest(f"input {i} is empty; send some text", param="input")
    size = num_chars(item)
    if size > max_chars:
        raise RequestTooLarge(f"input {i} has {size} characters, the limit is {max_chars}; shorten it", param="input")
    return size


def _is_words(item: Any) -> bool:
    return isinstance(item, Sequence) and len(item) > 0 and all(isinstance(word, str) for word in item)
