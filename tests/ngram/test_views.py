"""Gather and merge in one against the operators that do one each; the cache against a dict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vbert.errors import ConfigError, ShapeError
from vbert.kernels.merge_rows import reference
from vbert.ngram.cache import NgramCache
from vbert.ngram.index import find_rows
from vbert.ngram.table import NgramTable, TableWriter
from vbert.ngram.views import add_views

CU_SEQLENS = np.array([0, 4, 5, 5, 12])
ROWS = np.array([3, -1, 7, 0, 9, 9, 2, -1, -1, 5, 1, 8])


def expected(table: torch.Tensor) -> torch.Tensor:
    u = torch.where(torch.from_numpy(ROWS)[:, None, None] >= 0, table.float()[ROWS.clip(0)], 0.0)
    return reference(u, torch.from_numpy(CU_SEQLENS).int(), torch.empty(len(ROWS), table.shape[2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [16, 33])
def test_views_are_added_to_what_is_there(dtype: torch.dtype, width: int) -> None:
    table = torch.randn(10, 3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = torch.ones(len(ROWS), width)
    after = add_views(table, ROWS, CU_SEQLENS, out=before.clone())
    torch.testing.assert_close(after - before, expected(table), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_views_of_a_table_are_those_of_its_rows(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = torch.randn(10, 3, 8, generator=torch.Generator().manual_seed(0))
    keys = (np.arange(10, dtype=np.uint64) + np.uint64(1)) << np.uint64(21)
    about = {"fingerprint": "f", "keys": keys, "counts": np.ones(10, np.int64), "width": 8, "dtype": dtype}
    with TableWriter(tmp_path / "t", **about) as writer:  # type: ignore[arg-type]
        writer.add(rows)
    table = NgramTable(tmp_path / "t", "f")
    assert table.look_up(keys[[4, 2]])[0].tolist() == [4, 2]
    assert table.look_up(keys[:1] + np.uint64(1))[0].tolist() == [-1]
    stored = torch.empty(10, 3, 8)
    table.gather(np.arange(10), stored)
    out = torch.zeros(len(ROWS), 8)
    table.add_views(ROWS, CU_SEQLENS, out)
    torch.testing.assert_close(out, expected(stored), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    table, out = torch.zeros(2, 3, 4), torch.zeros(12, 4)
    with pytest.raises(ShapeError, match="beyond the 2"):
        add_views(table, ROWS, CU_SEQLENS, out=out)
    with pytest.raises(ShapeError, match="do not fit"):
        add_views(table, ROWS * 0, CU_SEQLENS, out=out[:3])
    with pytest.raises(ShapeError, match="scales"):
        add_views(table.to(torch.int8), ROWS * 0, CU_SEQLENS, out=out)


def keys_of(numbers: list[int]) -> np.ndarray:
    return (np.array(numbers, np.uint64) + np.uint64(1)) << np.uint64(21)


def rows_of(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None, None].expand(-1, 3, 4)


def test_the_cache_keeps_what_is_used_and_gives_back_what_it_was_given() -> None:
    cache = NgramCache(64 * (3 * 4 * 2 + 8 + 1 + 32 + 64), 4)
    rng = np.random.default_rng(0)
    evicted = 0
    for _ in range(200):
        numbers = np.unique(rng.zipf(1.3, 20) % 500).tolist()
        found = cache.find(keys_of(numbers))
        out = torch.zeros(len(numbers), 4)
        cache.add_views(found, np.arange(len(numbers) + 1), out)
        for number, row, value in zip(numbers, found, out[:, 0].tolist(), strict=True):
            assert value == (number if row >= 0 else 0.0)
        missing = [n for n, row in zip(numbers, found, strict=True) if row < 0]
        evicted += cache.insert(keys_of(missing), rows_of(missing))[1]
        assert (cache.find(keys_of(missing)) >= 0).all()
        assert len(cache) <= 64
    assert evicted > 100
    assert (cache.find(keys_of([1, 2])) >= 0).all()  # the most frequent ones
    cache.discard(keys_of([1, 999]))
    assert (cache.find(keys_of([1, 2])) >= 0).tolist() == [False, True]
    cache.insert(keys_of([1]), rows_of([1]))
    out = torch.zeros(2, 4)
    cache.add_views(cache.find(keys_of([1, 2])), np.arange(3), out)
    assert out[:, 0].tolist() == [1.0, 2.0]


def test_the_cache_takes_more_at_once_than_it_holds_and_nothing_that_is_not_finite() -> None:
    cache = NgramCache(64 * (3 * 4 * 2 + 8 + 1 + 32 + 64), 4)
    cache.insert(keys_of(list(range(100))), rows_of(list(range(100))))
    found = cache.find(keys_of(list(range(100))))
    assert (found >= 0).sum() == len(cache) == 64
    assert sorted(found[found >= 0]) == list(range(64))
    cache.insert(keys_of([1000]), rows_of([70000]))  # beyond float16
    assert cache.find(keys_of([1000])).tolist() == [-1]


def test_an_ngram_is_worth_keeping_when_it_comes_again() -> None:
    cache = NgramCache(1 << 16, 4)
    assert not cache.worth_keeping(keys_of([1, 2, 3])).any()
    assert cache.worth_keeping(keys_of([2, 4])).tolist() == [True, False]
    with pytest.raises(ConfigError, match="n-gram cache"):
        NgramCache(100, 4)


def test_keys_leave_the_index_without_losing_others() -> None:
    from vbert.ngram.index import build_index, remove_key

    keys = np.random.default_rng(1).permutation(keys_of(list(range(400))))
    index = build_index(keys)
    for i in range(0, 400, 2):
        remove_key(keys[i], index)
    found = find_rows(keys, index)
    assert (found[0::2] == -1).all()
    assert found[1::2].tolist() == list(range(1, 400, 2))


def test_nobody_knows_which_n_grams_share_a_place() -> None:
    """Tenants choose token ids: n-grams that collide in one cache do not in another."""
    keys = keys_of(list(range(200)))
    places = []
    for _ in range(2):
        cache = NgramCache(2**20, 4)
        cache.insert(keys, torch.zeros(200, 3, 4))
        places.append(np.flatnonzero(cache._index[:, 0]).tolist())
        assert (cache.find(keys) >= 0).all()
    assert places[0] != places[1]


@pytest.mark.parametrize("slot", [0, 21, 42])
def test_n_grams_that_differ_in_one_token_are_not_taken_for_each_other(slot: int) -> None:
    cache = NgramCache(2**20, 4)
    same = sum(np.uint64(7) << np.uint64(other) for other in (0, 21, 42) if other != slot)
    keys = (np.arange(100, 400, dtype=np.uint64) << np.uint64(slot)) | np.uint64(same)
    assert not cache.worth_keeping(keys).any()
    assert cache.worth_keeping(keys[::-1]).mean() > 0.9
