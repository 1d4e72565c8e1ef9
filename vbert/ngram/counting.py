"""Which n-grams a corpus has and how often: counted as a stream, in bounded memory, and the head that a table keeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vbert.errors import ConfigError
from vbert.ngram.index import CODE_BITS, Keys, ngram_keys

__all__ = ["Coverage", "NgramCounts", "head", "num_tokens"]

Counts = NDArray[np.int64]
_MASK = np.uint64((1 << CODE_BITS) - 1)
_RIGHT = np.uint64((1 << 2 * CODE_BITS) - 1)
_CENTRE = _MASK << np.uint64(CODE_BITS)


def num_tokens(keys: Keys) -> NDArray[np.int64]:
    """[n] how many of its three tokens each n-gram has."""
    parts = [(keys >> np.uint64(shift)) & _MASK for shift in (0, CODE_BITS, 2 * CODE_BITS)]
    present: NDArray[np.int64] = np.stack([part != 0 for part in parts]).sum(0, dtype=np.int64)
    return present


class NgramCounts:
    """Every tri-gram of a corpus, and the bi-grams (with the right neighbour) and tokens that can stand in for it."""

    def __init__(self, max_keys: int = 20_000_000) -> None:
        """max_keys: distinct n-grams held, 16 bytes each, and as many new occurrences, about 150 bytes each while they
        are merged. When there are more, the rarest are forgotten: `forgotten` is how much a count may be too low."""
        if max_keys < 1:
            raise ConfigError(f"max_keys is {max_keys}; it must be above 0")
        self._max_keys = max_keys
        self._keys, self._counts = np.empty(0, np.uint64), np.empty(0, np.int64)
        self._new: list[Keys] = []
        self._num_new = 0
        self.num_occurrences = 0
        self.forgotten = 0

    def add(self, token_ids: NDArray[np.int64], cu_seqlens: NDArray[np.int64]) -> None:
        """Texts one after the other: token_ids [T], cu_seqlens [B + 1]."""
        keys = ngram_keys(token_ids, cu_seqlens)
        self.num_occurrences += len(keys)
        self._new += [keys, keys & _RIGHT, keys & _CENTRE]
        self._num_new += 3 * len(keys)
        if self._num_new > self._max_keys:
            self._merge()

    def result(self) -> tuple[Keys, Counts]:
        """Distinct n-grams, the most frequent first, and how often each could be looked up."""
        self._merge()
        order = np.lexsort((self._keys, -self._counts))
        return self._keys[order], self._counts[order]

    def _merge(self) -> None:
        if not self._new:
            return
        # a tri-gram at the start of a text is its own bi-gram, and counts as both
        new, how_often = np.unique(np.concatenate(self._new), return_counts=True)
        keys = np.concatenate([self._keys, new])
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], np.concatenate([self._counts, how_often])[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        self._keys, self._counts = keys[starts], np.add.reduceat(counts, starts)
        self._new, self._num_new = [], 0
        if (excess := len(self._keys) - self._max_keys) > 0:
            least = int(np.partition(self._counts, excess - 1)[excess - 1])
            kept = self._counts > least
            self._keys, self._counts = self._keys[kept], self._counts[kept]
            self.forgotten += least


def head(
    keys: Keys, counts: Counts, *, max_entries: int | None = None, coverage: float = 1.0, min_count: int = 2
) -> tuple[Keys, Counts]:
    """The most frequent n-grams: all tokens that fit, then longer ones until `coverage` of the occurrences of tri-grams
    inside texts is reached, of those seen `min_count` times at least. In the order of `NgramCounts.result`.

    Raises ConfigError.
    """
    if not 0 < coverage <= 1:
        raise ConfigError(f"coverage is {coverage}; give a share above 0 and up to 1")
    if min_count < 1:
        raise ConfigError(f"min_count is {min_count}; give at least 1")
    length = num_tokens(keys)
    single = length == 1
    seen = np.cumsum(np.where(length == 3, counts, 0))
    needed = np.concatenate([[0], seen[:-1]]) < coverage * (seen[-1] if len(seen) else 0)
    chosen = single | ((counts >= min_count) & needed)
    if max_entries is not None and chosen.sum() > max_entries:
        first = np.flatnonzero(single)[:max_entries]
        others = np.flatnonzero(chosen & ~single)[: max_entries - len(first)]
        chosen = np.zeros(len(keys), bool)
        chosen[first] = chosen[others] = True
    return keys[chosen], counts[chosen]


@dataclass(frozen=True, slots=True)
class Coverage:
    """Of the tokens of some text: shares whose tri-gram, else bi-gram, else token is in a table."""

    tokens: int
    tri: float
    bi: float
    uni: float

    @classmethod
    def of(cls, kept: NDArray[np.uint8]) -> Coverage:
        """kept: [T], as `NgramTable.look_up` gives it with depth 1."""
        total = max(1, len(kept))
        tri, bi, uni = (float((kept == length).sum()) / total for length in (3, 2, 1))
        return cls(len(kept), tri, bi, uni)
