"""Rows of a jsonl file, checked, and the tokenised examples that training and evaluation share.

One JSON object a line, in FILE.jsonl or FILE.jsonl.gz:

    classify        {"text": "...", "label": "..."}, a pair with "text_b" beside "text"
    regression      the same, the label a number
    token_classify  {"tokens": ["...", ...], "tags": ["...", ...]}

A classification row may give "tokens" in place of "text"; they are joined by one space. Other keys are left alone.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vbert.errors import BadRequest
from vbert.tokenizer import Encoded, Input, Tokenizer

__all__ = ["IGNORED", "TASKS", "Example", "Row", "label_names", "read_rows", "tokenise"]

TASKS = ("classify", "regression", "token_classify")
IGNORED = -100  # target of a token that has no tag of its own: special tokens and all but the first token of a word


@dataclass(frozen=True, slots=True)
class Row:
    """`target`: the label, the number, or one tag a word. `where`: "FILE line N", for errors about this row."""

    input: Input
    target: str | float | tuple[str, ...]
    where: str


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row. `word_starts`: position of each word's first token, -1 where a word was cut off or is empty.

    target: class [] int64, number [] float32, or class of each token [n] int64 with IGNORED.
    """

    row: Row
    token_ids: Tensor  # [n] int64
    type_ids: Tensor  # [n] int64
    target: Tensor
    word_starts: tuple[int, ...] = ()


def read_rows(path: Path | str, task: str) -> list[Row]:
    """Raises: BadRequest naming file and line for the first row that is not what the task needs."""
    rows = [_row(value, task, where) for value, where in _objects(Path(path))]
    if not rows:
        raise BadRequest(f"{path} has no rows; give one JSON object a line")
    return rows


def _objects(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The JSON objects of a file, each with its "FILE line N"; empty lines are passed over."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path} line {number}"
                    yield _object(line, where), where
    except FileNotFoundError:
        raise BadRequest(f"{path} does not exist; give a .jsonl or .jsonl.gz file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise BadRequest(f"{path} cannot be read ({error}); copy it again") from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRequest(f"{where} is not UTF-8 ({error.reason}, byte {error.start}); save it as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRequest(f"{where} is not JSON ({error}); write one object a line") from None
    if not isinstance(value, dict):
        raise BadRequest(f"{where} is a {type(value).__name__}; write one JSON object a line")
    return value


def _row(value: dict[str, Any], task: str, where: str) -> Row:
    if task == "token_classify":
        words, tags = _strings(value, "tokens", where), _strings(value, "tags", where)
        if len(words) != len(tags):
            raise BadRequest(f"{where} has {len(words)} tokens and {len(tags)} tags; give one tag a token")
        return Row(words, tuple(tags), where)
    text = " ".join(_strings(value, "tokens", where)) if "tokens" in value else _string(value, "text", where)
    pair = (text, _string(value, "text_b", where)) if "text_b" in value else text
    return Row(pair, _number(value, where) if task == "regression" else _label(value, where), where)


def _string(value: dict[str, Any], key: str, where: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text.strip():
        raise BadRequest(f"{where}: {key!r} is {_shown(text)}; give a text that is not empty", param=key)
    return text


def _strings(value: dict[str, Any], key: str, where: str) -> list[str]:
    words = value.get(key)
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise BadRequest(f"{where}: {key!r} is {_shown(words)}; give a list of texts that are not empty", param=key)
    return words


def _label(value: dict[str, Any], where: str) -> str:
    label = value.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise BadRequest(f"{where}: 'label' is {_shown(label)}; give a text or a whole number", param="label")
    return str(label)


def _number(value: dict[str, Any], where: str) -> float:
    label = value.get("label")
    if isinstance(label, bool) or not isinstance(label, int | float) or not math.isfinite(label):
        raise BadRequest(f"{where}: 'label' is {_shown(label)}; regression needs a finite number", param="label")
    return float(label)


def _shown(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def label_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """The labels or tags of the training rows in the order of a head: sorted, but the tag "O" first."""
    names = {name for row in rows for name in _names(row)}
    return tuple(sorted(names, key=lambda name: (name != "O", name)))


def _names(row: Row) -> tuple[str, ...]:
    if isinstance(row.target, float):
        return ()
    return (row.target,) if isinstance(row.target, str) else row.target


def tokenise(rows: Sequence[Row], tokenizer: Tokenizer, labels: Sequence[str], max_length: int) -> list[Example]:
    """Inputs beyond `max_length` tokens are cut. Raises: BadRequest naming the row whose label is not in `labels`."""
    class_of = {label: i for i, label in enumerate(labels)}
    for row in rows:
        for name in _names(row):
            if name not in class_of:
                raise BadRequest(
                    f"{row.where}: label {name!r} is not in the training file; correct it or add rows to train"
                )
    encoded = tokenizer.encode([row.input for row in rows], max_length=max_length)
    return [_example(row, item, class_of) for row, item in zip(rows, encoded, strict=True)]


def _example(row: Row, encoded: Encoded, class_of: dict[str, int]) -> Example:
    token_ids, type_ids = torch.tensor(encoded.token_ids), torch.tensor(encoded.type_ids)
    if isinstance(row.target, float):
        return Example(row, token_ids, type_ids, torch.tensor(row.target))
    if isinstance(row.target, str):
        return Example(row, token_ids, type_ids, torch.tensor(class_of[row.target]))
    first_of = {word: i for i, word in reversed(list(enumerate(encoded.word_ids))) if word is not None}
    starts = tuple(first_of.get(word, -1) for word in range(len(row.target)))
    target = torch.full((len(token_ids),), IGNORED)
    for start, tag in zip(starts, row.target, strict=True):
        if start >= 0:
            target[start] = class_of[tag]
    return Example(row, token_ids, type_ids, target, starts)
