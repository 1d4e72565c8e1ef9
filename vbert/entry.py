"""`Entry`: the sequences of a batch that skip the lower layers, on their way to the first layer above them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vbert.ngram.index import Keys, Rows, ngram_keys, shortened
from vbert.skip import SLOTS, SkipConfig

__all__ = ["Entry", "Tokens", "ngrams_of"]


def ngrams_of(token_ids: Sequence[Sequence[int]], config: SkipConfig) -> tuple[Keys, NDArray[np.int64]]:
    """The n-gram around each token of sequences one after the other, [T], and where each begins, [B + 1]."""
    cu_seqlens = np.zeros(len(token_ids) + 1, np.int64)
    np.cumsum([len(ids) for ids in token_ids], out=cu_seqlens[1:])
    keys = ngram_keys(_joined(token_ids), cu_seqlens)
    return keys if config.window == SLOTS else shortened(keys, 1), cu_seqlens


def _joined(parts: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    if len(parts) == 1:
        return np.asarray(parts[0], np.int64)
    return np.concatenate([np.empty(0, np.int64), *(np.asarray(part, np.int64) for part in parts)])


@dataclass(frozen=True, slots=True)
class Tokens:
    """Sequences one after the other. keys: [T], the n-gram around each token. types, positions: [T] int64, positions
    counted from 0 in each sequence. cu_seqlens: [B + 1]."""

    keys: Keys
    types: NDArray[np.int64]
    positions: NDArray[np.int64]
    cu_seqlens: NDArray[np.int64]

    @classmethod
    def of(cls, token_ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]], config: SkipConfig) -> Tokens:
        keys, cu_seqlens = ngrams_of(token_ids, config)
        return cls.at(keys, cu_seqlens, type_ids, config)

    @classmethod
    def at(
        cls, keys: Keys, cu_seqlens: NDArray[np.int64], type_ids: Sequence[Sequence[int]], config: SkipConfig
    ) -> Tokens:
        """Where the n-grams are known."""
        return cls(
            keys=keys,
            types=np.minimum(_joined(type_ids), config.type_vocab_size - 1),
            positions=np.arange(len(keys)) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens)),
            cu_seqlens=cu_seqlens,
        )

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class Entry:
    """tokens: of the sequences that skip. rows: [T, H] float32, what stored n-grams say of each token, added up, 0
    where there are none; None: there are none at all. missing: [m], distinct n-grams to compute. which: [T], for each
    token the one of these that is centred on it, or -1."""

    tokens: Tokens
    rows: Tensor | None
    missing: Keys
    which: Rows

    @classmethod
    def computed(cls, tokens: Tokens) -> Entry:
        """Nothing is stored."""
        missing, which = np.unique(tokens.keys, return_inverse=True)
        return cls(tokens, None, missing, which.astype(np.int64))

    def seen(self) -> tuple[Tensor, Tensor]:
        """Position and type ids, [T] each, in host memory."""
        return torch.from_numpy(self.tokens.positions), torch.from_numpy(self.tokens.types)
