"""N-grams as 64-bit keys, and an open-addressing index from keys to row numbers in one array.

A key packs three codes of 21 bits: the token left of the centre, the centre, the token right of it. A code is the
token id + 1; 0 is a missing token, whatever the vocabulary's padding id is. So (0, b, c) is the bi-gram that stands in
for any (a, b, c), and also what the first token of a text has: its left neighbour is missing there as well.

The index is [C, 2] uint64, C a power of two: key and row number of each place, key 0 where it is free. A key lies at
the first free place from its hash on. Kernels release the GIL, and take one core.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from vbert.errors import ShapeError
from vbert.ngram.prefetch import prefetch

__all__ = [
    "CODE_BITS",
    "MAX_TOKEN_ID",
    "Located",
    "build_index",
    "find_rows",
    "insert_key",
    "look_up",
    "mixed",
    "ngram_keys",
    "parts_of",
    "places_for",
    "remove_key",
    "shortened",
]

CODE_BITS = 21
MAX_TOKEN_ID = (1 << CODE_BITS) - 2
_MOST_FULL = 0.5  # of the places: then a key is found in the first cache line nearly always
_BLOCK = 256  # keys whose first places are asked for before any is read, so that the memory answers them side by side

_RIGHT = np.uint64((1 << 2 * CODE_BITS) - 1)  # centre and right
_CENTRE = np.uint64(((1 << CODE_BITS) - 1) << CODE_BITS)
_MASKS = (np.uint64(0), _CENTRE, _RIGHT, ~np.uint64(0))  # of a key, by how many tokens are left
_NO_SALT, _NO_ROWS = np.uint64(0), np.empty(0, np.uint8)

Keys = NDArray[np.uint64]
Rows = NDArray[np.int64]


def ngram_keys(token_ids: NDArray[np.int64], cu_seqlens: NDArray[np.int64]) -> Keys:
    """[T] the tri-gram around each token; a neighbour outside its sequence is missing.

    token_ids: [T], 0 <= id <= MAX_TOKEN_ID, not checked. cu_seqlens: [B + 1].
    """
    keys = np.empty(len(token_ids), np.uint64)
    _keys(token_ids, cu_seqlens, keys)
    return keys


def parts_of(keys: Keys) -> NDArray[np.int64]:
    """[n, 3] token ids of keys, -1 where one is missing."""
    mask = np.uint64((1 << CODE_BITS) - 1)
    codes = [(keys >> np.uint64(shift)) & mask for shift in (2 * CODE_BITS, CODE_BITS, 0)]
    return np.stack(codes, 1).astype(np.int64) - 1


def shortened(keys: Keys, tokens: int | NDArray[np.int64]) -> Keys:
    """[n] the keys of what stands in for n-grams: of 2 tokens, without the left one, or of 1, the centre. 3: itself."""
    out: Keys = keys & np.array(_MASKS)[tokens]
    return out


def places_for(num_keys: int) -> int:
    """Places of an index that holds so many keys."""
    return 1 << max(4, int(np.ceil(num_keys / _MOST_FULL)) - 1).bit_length()


def build_index(keys: Keys, index: Keys | None = None) -> Keys:
    """The index of distinct keys, key i having row i. index: zeros [C, 2] to write into, else a new one.

    Raises ShapeError when they do not fit, a key comes twice, or one has no centre.
    """
    if index is None:
        index = np.zeros((places_for(len(keys)), 2), np.uint64)
    if len(keys) > _MOST_FULL * len(index) or len(index) & (len(index) - 1):
        raise ShapeError(f"{len(keys)} keys do not fit an index of {len(index)} places; give {places_for(len(keys))}")
    if len(keys) and not (keys & _CENTRE).all():
        raise ShapeError("a key has no centre token; make keys with ngram_keys")
    twice = _build(keys, index)
    if twice >= 0:
        raise ShapeError(f"the n-gram {parts_of(keys[twice : twice + 1])[0].tolist()} comes twice; merge its rows")
    return index


def find_rows(keys: Keys, index: Keys) -> Rows:
    """[n] the row of each key, -1 where it is not there."""
    rows = np.empty(len(keys), np.int64)
    _find(keys, index, rows)
    return rows


def look_up(keys: Keys, index: Keys, depth: int = 3) -> tuple[Rows, NDArray[np.uint8]]:
    """The longest stored n-gram around each token: the tri-gram, the bi-gram with the right neighbour, or the token.

    depth: tokens of the shortest n-gram that will do: 3 takes what is exact only, 1 backs off to single tokens.
    Returns: [T] rows, -1 where there is none; [T] 3 for the key itself, 2 for it without the left neighbour, 1 without
    both, 0 for none.
    """
    rows, kept = np.empty(len(keys), np.int64), np.empty(len(keys), np.uint8)
    _look_up(keys, index, depth, rows, kept)
    return rows, kept


@dataclass(frozen=True, slots=True)
class Located:
    """The n-gram around each token of sequences one after the other, and where it was found, [T]: in which of several
    sources, in which row (-1: none), and how many of its tokens that row is of (0: none). cu_seqlens: [B + 1]."""

    keys: Keys
    cu_seqlens: NDArray[np.int64]
    source: NDArray[np.int32]
    row: Rows
    kept: NDArray[np.int8]

    @classmethod
    def unknown(cls, keys: Keys, cu_seqlens: NDArray[np.int64]) -> Located:
        """Nothing was looked for yet."""
        nowhere = np.full(len(keys), -1)
        return cls(keys, cu_seqlens, nowhere.astype(np.int32), nowhere, np.zeros(len(keys), np.int8))

    def fill(
        self,
        asking: NDArray[np.bool_],
        length: int,
        source: int,
        index: Keys,
        *,
        salt: np.uint64 = _NO_SALT,
        used: NDArray[np.uint8] = _NO_ROWS,
    ) -> int:
        """Look for n-grams of so many tokens, for the sequences that are asking, where nothing was found yet.

        asking: [B]. source: a number for this index. salt: its keys are XORed with it. used: [rows], set to 1 for those
        that are found; nothing where it is empty. Returns the highest row found, -1: none.
        """
        where = self.source, self.row, self.kept
        mask = _MASKS[length]
        return int(_fill(self.keys, self.cu_seqlens, asking, length, mask, salt, source, index, used, *where))


# ---- kernels -------------------------------------------------------------------------------------------------------

_SHIFT = np.uint64(CODE_BITS)
_ONE = np.uint64(1)
_FIRST_MIX, _SECOND_MIX = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_HALF = np.uint64(33)


@numba.njit(nogil=True, cache=True)
def _keys(ids, cu_seqlens, keys):  # type: ignore[no-untyped-def]
    for b in range(len(cu_seqlens) - 1):
        begin, end = cu_seqlens[b], cu_seqlens[b + 1]
        left = np.uint64(0)
        for i in range(begin, end):
            centre = np.uint64(ids[i]) + _ONE
            right = np.uint64(ids[i + 1]) + _ONE if i + 1 < end else np.uint64(0)
            keys[i] = (((left << _SHIFT) | centre) << _SHIFT) | right
            left = centre


@numba.njit(nogil=True, cache=True, inline="always")
def mixed(key):  # type: ignore[no-untyped-def]
    """64 bits, each of which depends on all of a key. Only inside kernels. Source: the finaliser of MurmurHash3
    (Appleby, public domain)."""
    key = (key ^ (key >> _HALF)) * _FIRST_MIX
    key = (key ^ (key >> _HALF)) * _SECOND_MIX
    return key ^ (key >> _HALF)


@numba.njit(nogil=True, cache=True, inline="always")
def _place(key, mask):  # type: ignore[no-untyped-def]
    return mixed(key) & mask


@numba.njit(nogil=True, cache=True)
def _build(keys, index):  # type: ignore[no-untyped-def]
    mask = np.uint64(len(index) - 1)
    for i in range(len(keys)):
        key = keys[i]
        place = _place(key, mask)
        while index[place, 0] != 0:
            if index[place, 0] == key:
                return i
            place = (place + _ONE) & mask
        index[place, 0] = key
        index[place, 1] = i
    return -1


@numba.njit(nogil=True, cache=True)
def insert_key(key, row, index):  # type: ignore[no-untyped-def]
    """A key that is not there, in an index with a free place. Only inside kernels."""
    mask = np.uint64(len(index) - 1)
    place = _place(key, mask)
    while index[place, 0] != 0:
        place = (place + _ONE) & mask
    index[place, 0], index[place, 1] = key, np.uint64(row)


@numba.njit(nogil=True, cache=True)
def remove_key(key, index):  # type: ignore[no-untyped-def]
    """Take a key out, and move back what lies beyond its place only because it was there. Only inside kernels.

    Source: Knuth, The Art of Computer Programming, volume 3, section 6.4, algorithm R.
    """
    mask = np.uint64(len(index) - 1)
    hole = _place(key, mask)
    while index[hole, 0] != key:
        if index[hole, 0] == 0:
            return
        hole = (hole + _ONE) & mask
    place = hole
    while True:
        place = (place + _ONE) & mask
        if index[place, 0] == 0:
            break
        home = _place(index[place, 0], mask)
        if ((place - home) & mask) >= ((place - hole) & mask):  # the hole lies between its home and it
            index[hole, 0], index[hole, 1] = index[place, 0], index[place, 1]
            hole = place
    index[hole, 0], index[hole, 1] = np.uint64(0), np.uint64(0)


@numba.njit(nogil=True, cache=True, inline="always")
def _walk(key, place, index, mask):  # type: ignore[no-untyped-def]
    """The row of a key, from a place on. Ends in a damaged index as well, which may have no free place."""
    for _ in range(len(index)):
        found = index[place, 0]
        if found == key:
            return np.int64(index[place, 1])
        if found == 0:
            return np.int64(-1)
        place = (place + _ONE) & mask
    return np.int64(-1)


@numba.njit(nogil=True, cache=True)
def _find(keys, index, rows):  # type: ignore[no-untyped-def]
    mask = np.uint64(len(index) - 1)
    places = np.empty(_BLOCK, np.uint64)
    for begin in range(0, len(keys), _BLOCK):
        count = min(_BLOCK, len(keys) - begin)
        for j in range(count):
            places[j] = _place(keys[begin + j], mask)
            prefetch(index, places[j])  # type: ignore[call-arg]
        for j in range(count):
            key = keys[begin + j]
            rows[begin + j] = _walk(key, places[j], index, mask) if key != 0 else np.int64(-1)


@numba.njit(nogil=True, cache=True)
def _fill(  # type: ignore[no-untyped-def]
    keys, cu_seqlens, asking, length, mask, salt, number, index, used, source, row, kept
):
    last, highest, count = np.uint64(len(index) - 1), np.int64(-1), 0
    left, wanted, places = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
    for b in range(len(asking)):
        if not asking[b]:
            continue
        for i in range(cu_seqlens[b], cu_seqlens[b + 1]):
            if kept[i] == 0 and keys[i] & mask != 0:
                left[count], wanted[count] = i, (keys[i] & mask) ^ salt
                places[count] = _place(wanted[count], last)
                prefetch(index, places[count])  # type: ignore[call-arg]
                count += 1
            if count == _BLOCK:
                most = _settle(left, wanted, places, count, length, number, index, used, source, row, kept)
                highest, count = max(highest, most), 0
    return max(highest, _settle(left, wanted, places, count, length, number, index, used, source, row, kept))


@numba.njit(nogil=True, cache=True, inline="always")
def _settle(  # type: ignore[no-untyped-def]
    left, wanted, places, count, length, number, index, used, source, row, kept
):
    last, highest = np.uint64(len(index) - 1), np.int64(-1)
    for j in range(count):
        found = _walk(wanted[j], places[j], index, last)
        if found >= 0:
            source[left[j]], row[left[j]], kept[left[j]] = number, found, length
            highest = max(highest, found)
            if len(used):
                used[found] = 1
    return highest


@numba.njit(nogil=True, cache=True)
def _look_up(keys, index, depth, rows, kept):  # type: ignore[no-untyped-def]
    mask = np.uint64(len(index) - 1)
    left, wanted, places = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
    for begin in range(0, len(keys), _BLOCK):
        count = min(_BLOCK, len(keys) - begin)
        for j in range(count):
            left[j] = begin + j
        for length in range(3, depth - 1, -1):
            keep = ~np.uint64(0) if length == 3 else (_RIGHT if length == 2 else _CENTRE)
            for j in range(count):
                wanted[j] = keys[left[j]] & keep
                places[j] = _place(wanted[j], mask)
                prefetch(index, places[j])  # type: ignore[call-arg]
            missing = 0
            for j in range(count):
                i = left[j]
                row = _walk(wanted[j], places[j], index, mask)
                if row >= 0:
                    rows[i], kept[i] = row, length
                else:
                    left[missing] = i
                    missing += 1
            count = missing
        for j in range(count):
            rows[left[j]], kept[left[j]] = -1, 0
