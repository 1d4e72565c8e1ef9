"""Making tables of n-grams: count a corpus, keep the head, encode it; merge and prune what there is.

Everything is written by `TableWriter`: whoever reads the old file goes on reading it, and a table is there whole or not
at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vbert.errors import ConfigError, ShapeError
from vbert.local_layers import LocalLayers
from vbert.ngram.counting import Coverage, NgramCounts, head, num_tokens
from vbert.ngram.index import Keys, ngram_keys, places_for, shortened
from vbert.ngram.table import NgramTable, TableWriter
from vbert.skip import SLOTS
from vbert.tokenizer import Input, Tokenizer

__all__ = ["build_table", "count_texts", "coverage_of", "describe_table", "entries_in", "merge_tables", "prune_table"]

Told = Callable[[str, int, int], None]  # what is going on, how much is done, of how much
_AT_ONCE = 2048  # n-grams encoded or copied at once
_TEXTS_AT_ONCE, _CHARS_AT_ONCE = 2048, 1 << 22
_DTYPES = {"float16": torch.float16, "int8": torch.int8}


def count_texts(texts: Iterable[Input], tokenizer: Tokenizer, counts: NgramCounts) -> int:
    """Add the n-grams of texts, however long; returns how many texts there were."""
    number = 0
    for chunk in _chunks(texts):
        counts.add(*_tokenised(chunk, tokenizer))
        number += len(chunk)
    return number


def build_table(
    path: str | os.PathLike[str],
    local: LocalLayers,
    counts: NgramCounts,
    *,
    coverage: float = 1.0,
    min_count: int = 2,
    max_bytes: int | None = None,
    dtype: str | None = None,
    told: Told = lambda what, done, total: None,
) -> int:
    """Encode the most frequent n-grams of a corpus; returns how many. dtype: of the rows, float16 or int8.

    Raises ConfigError, OSError, CorruptFile."""
    keys, how_often = counts.result()
    if local.config.window != SLOTS:
        how_often = how_often[keys == shortened(keys, 1)]
        keys = keys[keys == shortened(keys, 1)]
    row_dtype = _row_dtype(dtype, torch.float16)
    most = None if max_bytes is None else entries_in(max_bytes, local.width, row_dtype)
    keys, how_often = head(keys, how_often, max_entries=most, coverage=coverage, min_count=min_count)
    about = {"encoder": local.fingerprint, "occurrences": str(counts.num_occurrences)}
    with TableWriter(
        path, fingerprint=local.base, keys=keys, counts=how_often, width=local.width, dtype=row_dtype, about=about
    ) as writer:
        for i in range(0, len(keys), _AT_ONCE):
            writer.add(local.encode(keys[i : i + _AT_ONCE]).float().cpu())
            told("encoding", min(len(keys), i + _AT_ONCE), len(keys))
    return len(keys)


def merge_tables(
    path: str | os.PathLike[str],
    tables: Sequence[NgramTable],
    *,
    dtype: str | None = None,
    told: Told = lambda what, done, total: None,
) -> int:
    """One table of several: of an n-gram that more than one has, the row of the first. Returns how many entries there
    are. Raises ConfigError when they were made by different backbones, OSError, CorruptFile."""
    first = tables[0]
    for other in tables[1:]:
        if (other.fingerprint, other.width) != (first.fingerprint, first.width):
            raise ConfigError(
                f"{other.path} was made by backbone {other.fingerprint[:23]}, {first.path} by "
                f"{first.fingerprint[:23]}; merge tables of one backbone"
            )
        if (ours := first.encoder) != (theirs := other.encoder):
            raise ConfigError(
                f"the rows of {other.path} were encoded by {theirs[:23]}, those of {first.path} by {ours[:23]}: local "
                "layers adapted to a domain; serve them as tables of their own, DOMAIN=FILE"
            )
    every = np.concatenate([table.keys for table in tables])
    source = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    row = np.concatenate([np.arange(len(table)) for table in tables])
    counts = np.concatenate([table.counts.numpy() for table in tables]).astype(np.int64)
    keys, firsts, inverse = np.unique(every, return_index=True, return_inverse=True)
    total = np.bincount(inverse, weights=counts).astype(np.int64)
    order = np.lexsort((keys, -total))
    return _copy(path, tables, keys[order], total[order], source[firsts[order]], row[firsts[order]], dtype, told)


def prune_table(
    path: str | os.PathLike[str],
    table: NgramTable,
    *,
    coverage: float = 1.0,
    min_count: int = 1,
    max_bytes: int | None = None,
    dtype: str | None = None,
    told: Told = lambda what, done, total: None,
) -> int:
    """The most frequent n-grams of a table; returns how many. Raises ConfigError, OSError, CorruptFile."""
    keys, counts = table.keys, table.counts.numpy().astype(np.int64)
    most = None if max_bytes is None else entries_in(max_bytes, table.width, _row_dtype(dtype, table.dtype))
    kept, how_often = head(keys, counts, max_entries=most, coverage=coverage, min_count=min_count)
    rows = np.flatnonzero(np.isin(keys, kept))
    return _copy(path, [table], kept, how_often, np.zeros(len(kept), np.int64), rows, dtype, told)


def coverage_of(table: NgramTable, texts: Iterable[Input], tokenizer: Tokenizer) -> Coverage:
    """What the table has of some texts."""
    kept = [np.empty(0, np.uint8)]
    for chunk in _chunks(texts):
        kept.append(table.look_up(ngram_keys(*_tokenised(chunk, tokenizer)), 1)[1])
    return Coverage.of(np.concatenate(kept))


def describe_table(table: NgramTable) -> dict[str, Any]:
    """What it holds, for people. Raises CorruptFile."""
    by_length = np.bincount(num_tokens(table.keys), minlength=SLOTS + 1)
    return {
        "table": str(table.path),
        "backbone": table.fingerprint,
        "entries": len(table),
        "trigrams": int(by_length[3]),
        "bigrams": int(by_length[2]),
        "tokens": int(by_length[1]),
        "width": table.width,
        "dtype": str(table.dtype).removeprefix("torch."),
        "bytes": table.num_bytes,
    }


def entries_in(max_bytes: int, width: int, dtype: torch.dtype) -> int:
    """How many entries a file of so many bytes holds, its index included. Raises ConfigError for none."""
    per_row = SLOTS * width * dtype.itemsize + (4 * SLOTS if dtype == torch.int8 else 0) + 4
    count = max_bytes // (per_row + 16)
    while count and count * per_row + 16 * places_for(count) > max_bytes:
        count -= max(1, count // 64)
    if count < 1:
        raise ConfigError(f"max_bytes is {max_bytes}, and one entry takes {per_row} and its index; give more")
    return int(count)


def _copy(
    path: str | os.PathLike[str],
    tables: Sequence[NgramTable],
    keys: Keys,
    counts: NDArray[np.int64],
    source: NDArray[np.int64],
    row: NDArray[np.int64],
    dtype: str | None,
    told: Told,
) -> int:
    first = tables[0]
    with TableWriter(
        Path(path),
        fingerprint=first.fingerprint,
        keys=keys,
        counts=counts,
        width=first.width,
        dtype=_row_dtype(dtype, first.dtype),
        about=first.about,
    ) as writer:
        for i in range(0, len(keys), _AT_ONCE):
            here = slice(i, i + _AT_ONCE)
            out = torch.empty(len(keys[here]), SLOTS, first.width)
            for number, table in enumerate(tables):
                table.gather(np.where(source[here] == number, row[here], -1), out)
            writer.add(out)
            told("writing", min(len(keys), i + _AT_ONCE), len(keys))
    return len(keys)


def _row_dtype(name: str | None, default: torch.dtype) -> torch.dtype:
    if name is None:
        return default
    if name not in _DTYPES:
        raise ConfigError(f"the rows of a table are {' or '.join(_DTYPES)}, not {name}")
    return _DTYPES[name]


def _chunks(texts: Iterable[Input]) -> Iterable[list[Input]]:
    chunk: list[Input] = []
    chars = 0
    for text in texts:
        chunk.append(text)
        chars += len(text)
        if len(chunk) == _TEXTS_AT_ONCE or chars >= _CHARS_AT_ONCE:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def _tokenised(texts: Sequence[Input], tokenizer: Tokenizer) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids one after the other, and where each text begins."""
    encoded = tokenizer.encode(texts, offsets=False)
    if not encoded:
        raise ShapeError("there are no texts")
    lengths = [len(one.token_ids) for one in encoded]
    ids = np.fromiter((i for one in encoded for i in one.token_ids), np.int64, sum(lengths))
    return ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
