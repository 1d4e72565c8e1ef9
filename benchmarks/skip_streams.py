"""Streams of real texts: what benchmarks/skip.py sends before and while it measures."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["STREAMS", "Stream", "stream_of"]

STREAMS = ("unseen", "own domain", "zipf", "warm")


@dataclass(frozen=True, slots=True)
class Stream:
    """own: texts whose n-grams have a table. first: sent before anything is measured. texts: what is measured."""

    own: Sequence[str]
    first: Sequence[str]
    texts: Iterator[str]


def stream_of(kind: str, folder: Path, count: int) -> Stream:
    """kind: of STREAMS. folder: of a set, with train.jsonl.gz and test.jsonl.gz. count: of texts sent before."""
    train, test = (_texts(folder / f"{part}.jsonl.gz") for part in ("train", "test"))
    if kind == "own domain":
        return Stream(train, train[:count], iter(test))
    if kind == "zipf":
        return Stream((), (), _zipf(test, np.random.default_rng(0)))
    if kind == "warm":
        return Stream((), 2 * test[:count], itertools.cycle(test[:count]))
    return Stream((), (), iter(test))


def _zipf(texts: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    weights = rng.permutation(1.0 / np.arange(1, len(texts) + 1))
    while True:
        for i in rng.choice(len(texts), 1024, p=weights / weights.sum()):
            yield texts[int(i)]


def _texts(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]
