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

__all__ = ["Entry", "Tokens"]


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
        lengths = np.array([len(ids) for ids in token_ids], np.int64)
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        ids, types = (
            np.concatenate([np.empty(0, np.int64), *(np.asarray(part, np.int64) for part in parts)])
            for parts in (token_ids, type_ids)
        )
        keys = ngram_keys(ids, cu_seqlens)
        return cls(
            keys=keys if config.window == SLOTS else shortened(keys, 1),
            types=np.minimum(types, config.type_vocab_size - 1),
            positions=np.arange(len(ids)) - np.repeat(cu_seqlens[:-1], lengths),
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
