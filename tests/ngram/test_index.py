"""Keys of n-grams and the index: what a dictionary says, whatever the keys are."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vbert.errors import ShapeError
from vbert.ngram.index import (
    MAX_TOKEN_ID,
    Located,
    build_index,
    find_rows,
    look_up,
    ngram_keys,
    parts_of,
    places_for,
    shortened,
)


def keys_of(*texts):
    lengths = np.cumsum([0, *map(len, texts)])
    return ngram_keys(np.array([i for text in texts for i in text], np.int64), lengths)


def random_texts(rng, count, vocabulary):
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(1, 12))] for _ in range(count)]


def test_a_key_is_the_token_and_its_neighbours_in_the_same_text():
    keys = keys_of([5, 0, 7], [9], [])
    assert parts_of(keys).tolist() == [[-1, 5, 0], [5, 0, 7], [0, 7, -1], [-1, 9, -1]]


def test_token_zero_and_the_padding_id_are_ordinary_tokens():
    """A missing neighbour has a code of its own."""
    assert len({*keys_of([0, 0, 0]).tolist(), *keys_of([1, 1, 1]).tolist()}) == 6
    assert keys_of([0]).tolist() != [0]
    assert parts_of(keys_of([MAX_TOKEN_ID] * 3)).tolist()[1] == [MAX_TOKEN_ID] * 3


@pytest.mark.parametrize("count", [0, 1, 7, 500, 20_000])
def test_every_key_is_found_and_no_other(count):
    rng = np.random.default_rng(count)
    keys = np.unique(rng.integers(1, 2**63, 2 * count, dtype=np.uint64) | np.uint64(1 << 21))
    rng.shuffle(keys)
    stored, others = keys[:count], keys[count:]
    index = build_index(stored)
    assert len(index) == places_for(count)
    assert find_rows(stored, index).tolist() == list(range(count))
    assert (find_rows(others, index) == -1).all()


@pytest.mark.parametrize("seed", range(3))
def test_n_grams_are_located_for_those_who_ask(seed):
    """Two indices in turn, longer n-grams first, as `look_up` finds them one by one."""
    rng = random.Random(seed)
    texts = [*random_texts(rng, 80, 9), [], [rng.randrange(9) for _ in range(300)], []]
    keys, cu_seqlens = keys_of(*texts), np.cumsum([0, *map(len, texts)])
    every = np.unique(np.concatenate([keys, shortened(keys, 2), shortened(keys, 1)]))
    salt = np.uint64(rng.getrandbits(63) | 1 << 63)
    stored = [np.array(rng.sample(every.tolist(), len(every) // 3), np.uint64) for _ in range(2)]
    indices = [build_index(stored[0]), build_index(stored[1] ^ salt)]
    used = np.zeros(len(stored[1]), np.uint8)
    asking = np.array([rng.random() < 0.7 for _ in texts])
    located = Located.unknown(keys, cu_seqlens)
    for length in (3, 2, 1):
        located.fill(asking, length, 0, indices[0])
        located.fill(asking, length, 1, indices[1], salt=salt, used=used)
    rows = [{int(key): row for row, key in enumerate(part)} for part in stored]
    wanted = []
    for i, key in enumerate(keys):
        asks = asking[np.searchsorted(cu_seqlens, i, "right") - 1]
        tries = [(n, rows[n], length) for length in (3, 2, 1) for n in (0, 1)]
        hits = ((n, own[short], length) for n, own, length in tries if (short := int(shortened(key, length))) in own)
        wanted.append(next(hits, (-1, -1, 0)) if asks else (-1, -1, 0))
    assert list(zip(located.source, located.row, located.kept, strict=True)) == wanted
    assert np.flatnonzero(used).tolist() == sorted({row for source, row, _ in wanted if source == 1})
    assert len({*located.source.tolist()}) == 3


def test_the_highest_row_is_told():
    keys, cu_seqlens = keys_of([1, 2, 3]), np.array([0, 3])
    index = build_index(keys[[2, 0]])
    assert Located.unknown(keys, cu_seqlens).fill(np.array([True]), 3, 0, index) == 1
    assert Located.unknown(keys, cu_seqlens).fill(np.array([False]), 3, 0, index) == -1


def test_a_key_of_nothing_is_nowhere():
    index = build_index(keys_of([1, 2, 3]))
    assert Located.unknown(np.zeros(2, np.uint64), np.array([0, 2])).fill(np.array([True]), 3, 0, index) == -1


def test_keys_that_fall_on_one_place_are_all_found():
    """In the smallest index every place is a start of many keys, the last one too, after which the first comes."""
    every = np.arange(1, 400, dtype=np.uint64) << np.uint64(21)
    for begin in range(0, 390, 8):
        stored = every[begin : begin + 8]
        index = build_index(stored)
        assert len(index) == 16
        assert find_rows(stored, index).tolist() == list(range(len(stored)))
        assert (find_rows(np.setdiff1d(every, stored), index) == -1).all()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_look_up_takes_the_longest_there_is(depth):
    rng = random.Random(depth)
    keys = keys_of(*random_texts(rng, 400, 9))
    parts = [tuple(p) for p in parts_of(keys).tolist()]
    every = {p for a, b, c in parts for p in ((a, b, c), (-1, b, c), (-1, b, -1))}
    chosen = sorted(rng.sample(sorted(every), len(every) // 3))
    index = build_index(np.array([_pack(p) for p in chosen], np.uint64))
    rows, kept = look_up(keys, index, depth)
    for (a, b, c), row, length in zip(parts, rows.tolist(), kept.tolist(), strict=True):
        tries = [((a, b, c), 3), ((-1, b, c), 2), ((-1, b, -1), 1)][: 4 - depth]
        want = next(((chosen.index(p), n) for p, n in tries if p in chosen), (-1, 0))
        assert (row, length) == want
    assert set(kept.tolist()) == {0, *range(depth, 4)}


def test_too_many_keys_and_a_key_twice_are_refused():
    with pytest.raises(ShapeError, match="9 keys do not fit an index of 16 places; give 32"):
        build_index(np.arange(1, 10, dtype=np.uint64) << np.uint64(21), np.zeros((16, 2), np.uint64))
    with pytest.raises(ShapeError, match="no centre"):
        build_index(np.zeros(1, np.uint64))
    assert find_rows(np.zeros(1, np.uint64), build_index(keys_of([4]))).tolist() == [-1]
    with pytest.raises(ShapeError, match=r"the n-gram \[-1, 4, -1\] comes twice"):
        build_index(np.repeat(keys_of([4]), 2))


def _pack(parts):
    key = 0
    for part in parts:
        key = key << 21 | (part + 1)
    return key
