"""Operator: attention inside n-grams, whose slots see each other and some constant rows."""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from vbert.errors import ShapeError
from vbert.kernels.backend import Backend, pick
from vbert.kernels.rows import as_rows, load, store, use_threads

__all__ = ["slot_attention"]

_SLOTS = 3


def slot_attention(
    qkv: Tensor,
    sink_keys: Tensor,
    sink_values: Tensor,
    present: Tensor,
    num_heads: int,
    *,
    out: Tensor,
    backend: Backend | None = None,
) -> Tensor:
    """For each n-gram and head: softmax(q K^T / sqrt(D)) V, K and V being the sinks' rows and those of its full slots.

    Args:
        qkv: [3 m, 3 H] float32 or bfloat16, on a GPU also float16: query, key and value of each slot side by side, the
            three slots of an n-gram one after the other.
        sink_keys, sink_values: [S, H] float32. present: [m, 3] bool, at least one True where S is 0.
        out: [3 m, H], as `qkv`; rows of empty slots hold numbers that mean nothing.
    Returns: `out`. Raises: ShapeError, KernelUnavailable.
    Source: Vaswani et al. 2017, arXiv:1706.03762, on the n-grams of SkipBERT (Wang et al. 2022, ACL).
    """
    width = out.shape[1]
    if qkv.shape != (_SLOTS * len(present), 3 * width) or out.shape != (len(qkv), width) or width % num_heads:
        raise ShapeError(f"qkv {list(qkv.shape)} of {len(present)} n-grams does not fit {list(out.shape)}")
    if sink_keys.shape != sink_values.shape or sink_keys.shape[1:] != (width,) or sink_keys.dtype != torch.float32:
        raise ShapeError(f"sinks {list(sink_keys.shape)} of {sink_keys.dtype} are not [S, {width}] of float32")
    if pick(backend, qkv) is not Backend.CPU:
        return reference(qkv, sink_keys, sink_values, present, num_heads, out)
    use_threads(2 * _SLOTS * (_SLOTS + len(sink_keys)) * width * len(present))
    keys, values = as_rows(sink_keys), as_rows(sink_values)
    sizes = np.uint64(num_heads), np.uint64(width // num_heads), np.uint64(len(sink_keys))
    _cpu(as_rows(qkv), keys, values, present.numpy(), as_rows(out), *sizes)
    return out


def reference(
    qkv: Tensor, sink_keys: Tensor, sink_values: Tensor, present: Tensor, num_heads: int, out: Tensor
) -> Tensor:
    """Batched products of torch; also what a GPU runs, where these are a few launches."""
    m, width = len(present), out.shape[1]
    q, k, v = qkv.view(m, _SLOTS, 3, width).float().unbind(2)
    k, v = (torch.cat([s.expand(m, -1, -1), own], 1) for s, own in ((sink_keys, k), (sink_values, v)))
    q, k, v = (rows.view(m, -1, num_heads, width // num_heads).transpose(1, 2) for rows in (q, k, v))
    allowed = torch.cat([present.new_ones(m, len(sink_keys)), present], 1)[:, None, None]
    scores = (q @ k.transpose(2, 3) / math.sqrt(width // num_heads)).masked_fill(~allowed, -math.inf)
    return out.copy_((scores.softmax(-1) @ v).transpose(1, 2).reshape(m * _SLOTS, width))


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _cpu(qkv, sink_keys, sink_values, present, out, heads, size, sinks):  # type: ignore[no-untyped-def]
    (x, x_stride), (sk, sk_stride), (sv, sv_stride), (y, y_stride) = qkv, sink_keys, sink_values, out
    width, scale = heads * size, np.float32(1.0) / np.sqrt(np.float32(size))
    for n in numba.prange(present.shape[0]):
        scores, context = np.empty(sinks + np.uint64(3), np.float32), np.empty(size, np.float32)
        first = np.uint64(n) * np.uint64(3)
        for a in range(heads):
            head = a * size
            for s in range(np.uint64(3)):
                q0 = (first + s) * x_stride + head
                highest = np.float32(-np.inf)
                for j in range(sinks + np.uint64(3)):
                    if j >= sinks and not present[n, j - sinks]:
                        scores[j] = -np.inf
                        continue
                    total = np.float32(0.0)
                    if j < sinks:
                        for d in range(size):
                            total += load(x[q0 + d]) * sk[j * sk_stride + head + d]
                    else:
                        k0 = (first + j - sinks) * x_stride + width + head
                        for d in range(size):
                            total += load(x[q0 + d]) * load(x[k0 + d])
                    scores[j] = total * scale
                    highest = max(highest, scores[j])
                summed = np.float32(0.0)
                for d in range(size):
                    context[d] = np.float32(0.0)
                for j in range(sinks + np.uint64(3)):
                    if j >= sinks and not present[n, j - sinks]:
                        continue
                    weight = np.exp(scores[j] - highest)
                    summed += weight
                    if j < sinks:
                        for d in range(size):
                            context[d] += weight * sv[j * sv_stride + head + d]
                    else:
                        v0 = (first + j - sinks) * x_stride + np.uint64(2) * width + head
                        for d in range(size):
                            context[d] += weight * load(x[v0 + d])
                y0 = (first + s) * y_stride + head
                for d in range(size):
                    store(y, y0 + d, context[d] / summed)
