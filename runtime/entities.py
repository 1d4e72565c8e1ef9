"""Token logits of one input to labelled spans: word by word, then BIO, IOB, BIOES or bare labels into entities."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.request import Entity, Input
from vbert.tokenizer import Encoded

__all__ = ["find_entities"]

_BEGINS, _ENDS = ("B", "S", "U"), ("E", "L", "S", "U")
_PREFIXES = ("B", "I", "E", "S", "L", "U")


@dataclass(slots=True)
class _Span:
    start: int
    end: int
    kind: str
    scores: list[float]
    closed: bool


def find_entities(
    item: Input, encoded: Encoded, probabilities: NDArray[np.float32], labels: Sequence[str]
) -> tuple[Entity, ...]:
    """The entities of one input.

    A word has the label of its first token, as token classifiers are trained. Neighbouring words of one type are one
    entity unless a prefix begins or ends it in between; an I- without a B- before it begins one (IOB1).

    Args:
        item: the text, or the list of words.  probabilities: [n, C], softmax of the token logits.
    Returns: entities in order. start, end: code points of the text, or word positions; score: mean of its words.
    """
    best = probabilities.argmax(axis=1)
    spans: list[_Span] = []
    previous_word = -2
    for word, (start, end, token) in enumerate(_words(item, encoded)):
        prefix, kind = _split(labels[best[token]])
        score = float(probabilities[token, best[token]])
        last = spans[-1] if spans and previous_word == word - 1 else None
        if kind is None:
            pass
        elif last is not None and last.kind == kind and not last.closed and prefix not in _BEGINS:
            last.end, last.closed = end, prefix in _ENDS
            last.scores.append(score)
        else:
            spans.append(_Span(start, end, kind, [score], prefix in _ENDS))
        previous_word = word if kind is not None else -2
    return tuple(_entity(item, span) for span in spans)


def _words(item: Input, encoded: Encoded) -> Iterator[tuple[int, int, int]]:
    """(start, end, first token) of each word that has tokens. Words of white space alone, which some tokenizers make
    at the end of a text, are left out."""
    firsts = [i for i, w in enumerate(encoded.word_ids) if w is not None and (i == 0 or encoded.word_ids[i - 1] != w)]
    for first in firsts:
        word = encoded.word_ids[first]
        assert word is not None
        if not isinstance(item, str):
            yield word, word + 1, first
            continue
        last = first
        while last + 1 < len(encoded.word_ids) and encoded.word_ids[last + 1] == word:
            last += 1
        start, end = _trimmed(item, encoded.offsets[first][0], encoded.offsets[last][1])
        if start < end:
            yield start, end, first


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Some tokenizers count the space before a word as part of it, and leave a mark that they strip from its last
    letter, or compose with it, outside."""
    piece = text[start:end]
    start, end = end - len(piece.lstrip()), start + len(piece.rstrip())
    while start < end < len(text) and unicodedata.combining(text[end]):
        end += 1
    return start, end


def _split(label: str) -> tuple[str, str | None]:
    """("B", "PER") of B-PER, ("I", "PER") of a bare PER, ("", None) of O."""
    prefix, dash, kind = label.partition("-")
    if dash and prefix in _PREFIXES:
        return prefix, kind
    return ("", None) if label == "O" else ("I", label)


def _entity(item: Input, span: _Span) -> Entity:
    if isinstance(item, str):
        text = item[span.start : span.end]
    else:
        text = " ".join(str(word) for word in item[span.start : span.end])
    score = sum(span.scores) / len(span.scores)
    return Entity(start=span.start, end=span.end, label=span.kind, score=score, text=text)
