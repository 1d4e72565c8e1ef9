"""Counts of n-grams: those of a dictionary, in whatever pieces the corpus comes."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from vbert.errors import ConfigError
from vbert.ngram.counting import Coverage, NgramCounts, head, num_tokens
from vbert.ngram.index import build_index, look_up, ngram_keys, parts_of


def packed(texts):
    return np.array([i for text in texts for i in text], np.int64), np.cumsum([0, *map(len, texts)])


def expected(texts):
    seen = Counter()
    for text in texts:
        around = [-1, *text, -1]
        for a, b, c in zip(around[:-2], text, around[2:], strict=True):
            seen.update([(a, b, c), (-1, b, c), (-1, b, -1)])
    return seen


@pytest.fixture
def texts():
    rng = random.Random(0)
    return [[int(rng.paretovariate(0.7)) % 50 for _ in range(rng.randint(1, 20))] for _ in range(300)]


def test_counts_are_those_of_a_dictionary(texts, monkeypatch):
    counts = NgramCounts()
    for begin in range(0, 300, 7):
        counts.add(*packed(texts[begin : begin + 7]))
        if begin % 3 == 0:
            counts._merge()
    keys, how_often = counts.result()
    found = {tuple(p): n for p, n in zip(parts_of(keys).tolist(), how_often.tolist(), strict=True)}
    assert found == expected(texts)
    assert (np.diff(how_often) <= 0).all()
    assert counts.num_occurrences == sum(map(len, texts))
    assert counts.forgotten == 0


def test_memory_is_bounded_by_forgetting_the_rarest(texts):
    counts, seen = NgramCounts(max_keys=300), Counter()
    for begin in range(0, 300, 5):
        part = [[i + 50 * (begin > 150) for i in text] for text in texts[begin : begin + 5]]  # another topic
        counts.add(*packed(part))
        counts._merge()
        seen += expected(part)
        assert len(counts._keys) <= 300
    keys, how_often = counts.result()
    found = {tuple(p): n for p, n in zip(parts_of(keys).tolist(), how_often.tolist(), strict=True)}
    assert 0 < counts.forgotten < max(seen.values()) / 4
    assert len(found) > 100
    for parts, n in seen.items():
        assert n - counts.forgotten <= found.get(parts, 0) <= n


def test_the_head_has_all_tokens_and_what_covers_enough(texts):
    counts = NgramCounts()
    counts.add(*packed(texts))
    keys, how_often = counts.result()
    occurrences = ngram_keys(*packed(texts))
    for coverage in (0.2, 0.5, 0.8):
        chosen, _ = head(keys, how_often, coverage=coverage, min_count=1)
        kept = look_up(occurrences, build_index(chosen), 1)[1]
        covered = Coverage.of(kept)
        assert covered.tri >= coverage * 0.95
        assert covered.tri + covered.bi + covered.uni == pytest.approx(1)
    chosen, seen = head(keys, how_often)
    assert (seen[num_tokens(chosen) > 1] >= 2).all()
    assert set(parts_of(chosen)[num_tokens(chosen) == 1][:, 1]) == {i for text in texts for i in text}
    assert len(head(keys, how_often, max_entries=60)[0]) == 60
    assert (num_tokens(head(keys, how_often, max_entries=10)[0]) == 1).all()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="coverage is 0"):
        head(np.empty(0, np.uint64), np.empty(0, np.int64), coverage=0)
    with pytest.raises(ConfigError, match="max_keys is 0"):
        NgramCounts(0)
    assert len(NgramCounts().result()[0]) == 0
