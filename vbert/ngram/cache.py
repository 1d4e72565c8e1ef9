"""Rows of n-grams that were computed because no table has them: a bounded table in memory that changes as texts come.

An n-gram gets a place when it is seen a second time (most of those in a corpus are seen once), and loses it to another
when it was not looked up since the hand of a clock came by. Source of the eviction: Corbato 1968, CLOCK.
"""

from __future__ import annotations

import secrets

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vbert.errors import ConfigError, ShapeError
from vbert.ngram.index import Keys, Located, Rows, find_rows, insert_key, mixed, places_for, remove_key
from vbert.ngram.views import add_views

__all__ = ["NgramCache"]

_SEEN_PER_ROW = 8  # n-grams remembered as seen once, for each row


class NgramCache:
    """Not for several threads at once: rows that were found are gone after the next `insert`."""

    def __init__(self, num_bytes: int, width: int) -> None:
        """Raises ConfigError when not even a few rows of 3 x `width` float16 fit."""
        per_row = 3 * width * 2 + 8 + 1 + 4 * _SEEN_PER_ROW + 2 * 16 * 2
        capacity = num_bytes // per_row
        if capacity < 64:
            raise ConfigError(f"the n-gram cache has {num_bytes} bytes; give it {64 * per_row} at least, or 0 for none")
        self._rows = torch.empty(capacity, 3, width, dtype=torch.float16)
        self._keys = np.zeros(capacity, np.uint64)
        self._used = np.zeros(capacity, np.uint8)
        self._index = np.zeros((places_for(capacity), 2), np.uint64)
        self._seen = np.zeros(1 << (_SEEN_PER_ROW * capacity - 1).bit_length(), np.uint32)
        self._hand, self._filled = 0, 0
        self._salt = _new_salt()

    def __len__(self) -> int:
        return self._filled

    @property
    def num_bytes(self) -> int:
        """Of what is held, the index included."""
        arrays = (self._index, self._seen, self._keys, self._used)
        return sum(array.nbytes for array in arrays) + self._filled * self._rows[0].nbytes

    def find(self, keys: Keys) -> Rows:
        """[n] rows, -1 where there is none. What is found stays longer."""
        rows = find_rows(keys ^ self._salt, self._index)
        self._used[rows[rows >= 0]] = 1
        return rows

    def fill(self, located: Located, asking: NDArray[np.bool_], length: int, source: int) -> None:
        """As vbert.ngram.index.Located.fill. What is found stays longer."""
        located.fill(asking, length, source, self._index, salt=self._salt, used=self._used)

    def add_views(self, rows: Rows, cu_seqlens: NDArray[np.int64], out: Tensor) -> None:
        """As vbert.ngram.views.add_views."""
        add_views(self._rows, rows, cu_seqlens, out=out)

    def worth_keeping(self, keys: Keys) -> NDArray[np.bool_]:
        """[n] which distinct n-grams were seen before, as far as one can remember. They count as seen now."""
        again = np.empty(len(keys), np.bool_)
        _see(keys ^ self._salt, self._seen, again)
        return again

    def insert(self, keys: Keys, rows: Tensor) -> tuple[int, int]:
        """Keep rows [n, 3, H] of distinct n-grams; returns how many are new, and how many others went. Raises
        ShapeError."""
        if rows.shape != (len(keys), *self._rows.shape[1:]):
            raise ShapeError(f"rows {list(rows.shape)} do not fit {len(keys)} n-grams of {list(self._rows.shape[1:])}")
        keys = keys ^ self._salt
        new = np.flatnonzero(find_rows(keys, self._index) < 0)[: len(self._keys)]
        fits = torch.isfinite(rows[new].half()).flatten(1).all(1).numpy() if len(new) else np.zeros(0, bool)
        new = new[fits]
        places = np.empty(len(new), np.int64)
        self._hand, self._filled, evicted = _replace(
            keys[new], self._index, self._keys, self._used, self._hand, self._filled, places
        )
        self._rows[torch.from_numpy(places)] = rows[torch.from_numpy(new)].half()
        return len(new), int(evicted)

    def discard(self, keys: Keys) -> None:
        """Forget these n-grams, where they are: something may be wrong with their rows."""
        distinct = np.unique(keys ^ self._salt)
        rows = find_rows(distinct, self._index)
        _remove(distinct[rows >= 0], self._index)
        self._keys[rows[rows >= 0]] = 0  # the hand gives these rows to others when it comes by


def _new_salt() -> np.uint64:
    """Tenants may send any token ids: nobody is to know which n-grams share a place. The highest bit, which no key has,
    keeps what is stored from being 0, a free place."""
    return np.uint64(secrets.randbits(63) | 1 << 63)


@numba.njit(nogil=True, cache=True)
def _see(keys, seen, again):  # type: ignore[no-untyped-def]
    mask = np.uint64(len(seen) - 1)
    for i in range(len(keys)):
        bits = mixed(keys[i])
        place, tag = (bits >> np.uint64(32)) & mask, np.uint32(bits & np.uint64(0xFFFFFFFF)) | np.uint32(1)
        again[i] = seen[place] == tag
        seen[place] = tag


@numba.njit(nogil=True, cache=True)
def _remove(keys, index):  # type: ignore[no-untyped-def]
    for i in range(len(keys)):
        remove_key(keys[i], index)


@numba.njit(nogil=True, cache=True)
def _replace(new, index, keys, used, hand, filled, places):  # type: ignore[no-untyped-def]
    """Give each new key a row: a free one, else that of the first key at the hand that was not used since. A row given
    in this call is not taken again in it."""
    evicted = 0
    for i in range(len(new)):
        if filled < len(keys):
            row = filled
            filled += 1
        else:
            while used[hand] != 0:
                if used[hand] == 1:
                    used[hand] = 0
                hand = (hand + 1) % len(keys)
            row = hand
            hand = (hand + 1) % len(keys)
            if keys[row] != 0:
                remove_key(keys[row], index)
                evicted += 1
        keys[row], used[row], places[i] = new[i], 2, row
        insert_key(new[i], row, index)
    for i in range(len(new)):
        used[places[i]] = 0
    return hand, filled, evicted
