"""Which newcomer a full cache takes: the one asked for more often than what it would replace (TinyLFU).

A scan of things that never come again then replaces nothing. Counts are kept of everything that was asked for lately,
in a count-min sketch of constant size. Source: Einziger, Friedman, Manes 2017, TinyLFU (ACM Transactions on Storage).
"""

from __future__ import annotations

import struct

__all__ = ["Sketch"]

_ROWS = 4
_MOST = 15  # more often than this is all the same
_SAMPLE = 40  # counts are halved after as many requests as this times the capacity
_COLUMNS = 16  # times the capacity: then a key that never came is hardly ever taken for one that did
_WORDS = struct.Struct(f"<{_ROWS}I")


class Sketch:
    """About how often each key was asked for lately. Keys are hashes: at least 16 random bytes."""

    def __init__(self, capacity: int) -> None:
        """capacity: about how many keys the cache holds."""
        self._mask = (1 << max(6, (_COLUMNS * capacity - 1).bit_length())) - 1
        self._counts = [bytearray(self._mask + 1) for _ in range(_ROWS)]
        self._sample = _SAMPLE * (self._mask + 1) // _COLUMNS
        self._left = self._sample

    @property
    def num_bytes(self) -> int:
        return _ROWS * (self._mask + 1)

    def add(self, key: bytes) -> None:
        """The key was asked for once more."""
        words = _WORDS.unpack_from(key)
        least = self.count(key)
        if least < _MOST:
            for counts, word in zip(self._counts, words, strict=True):
                place = word & self._mask
                if counts[place] == least:  # others are too high already: keys that share the place
                    counts[place] = least + 1
        self._left -= 1
        if not self._left:
            self._halve()

    def count(self, key: bytes) -> int:
        """Never too low but for the halvings."""
        words: tuple[int, ...] = _WORDS.unpack_from(key)
        return min(counts[word & self._mask] for counts, word in zip(self._counts, words, strict=True))

    def _halve(self) -> None:
        self._counts = [bytearray(counts.translate(_HALVES)) for counts in self._counts]
        self._left = self._sample // 2


_HALVES = bytes(count // 2 for count in range(256))
