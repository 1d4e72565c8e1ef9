"""Compile the kernels of n-grams before anybody waits for them."""

from __future__ import annotations

import numpy as np
import torch

from vbert.ngram.cache import NgramCache
from vbert.ngram.index import Located, build_index, look_up, ngram_keys
from vbert.ngram.views import add_views

__all__ = ["warm_up_ngrams"]


def warm_up_ngrams() -> None:
    """Run each once: seconds where numba's cache is empty, in a new checkout, else a fraction."""
    cu_seqlens = np.array([0, 2], np.int64)
    keys = ngram_keys(np.array([1, 2], np.int64), cu_seqlens)
    look_up(keys, build_index(keys), 1)
    cache = NgramCache(1 << 16, 4)
    cache.worth_keeping(keys)
    cache.insert(keys, torch.zeros(2, 3, 4))
    cache.discard(keys[:1])
    located = Located.unknown(keys, cu_seqlens)
    cache.fill(located, np.array([True]), 3, 0)
    rows, out = cache.find(keys), torch.zeros(2, 4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        add_views(torch.zeros(2, 3, 4, dtype=dtype), rows, cu_seqlens, out=out)
    add_views(torch.zeros(2, 3, 4, dtype=torch.int8), rows, cu_seqlens, out=out, scales=torch.zeros(2, 3))
