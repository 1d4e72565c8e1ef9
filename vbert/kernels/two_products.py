"""The float32 CPU kernel behind low rank and bottleneck: out += act(x A + a) B + b, rows and slots read in place.

No copy of either, whatever the lengths of the segments. One block of rows is one unit of work, two rows and four ranks
at a time in registers.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from torch import Tensor

from vbert.batch import Segments
from vbert.config import ACTIVATIONS
from vbert.kernels.rows import as_rows, use_threads

__all__ = ["ACTIVATION_CODES", "add_two_products"]

_DEPTH = 256  # inputs at a time: four ranks of them stay in the first-level cache
_GELU, _TANH_GELU, _RELU, _SILU, _TANH, _IDENTITY = range(6)
ACTIVATION_CODES = {
    "gelu": _GELU,
    "gelu_new": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "relu": _RELU,
    "silu": _SILU,
    "tanh": _TANH,
    "identity": _IDENTITY,
}
assert set(ACTIVATION_CODES) == set(ACTIVATIONS)


def add_two_products(
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    segments: Segments,
    *,
    out: Tensor,
    biases: tuple[Tensor, Tensor] | None = None,
    activation: str = "identity",
) -> None:
    """out[i:j] += act(hidden[i:j] @ down[p] + biases[0][p]) @ up[p] + biases[1][p] for each segment, in float32.

    hidden: [T, H_in]; may be `out`.  down: [P, H_in, R], up: [P, R, H_out], biases: [P, R] and [P, H_out].
    """
    rank, width_in, width_out = down.shape[2], down.shape[1], up.shape[2]
    use_threads(len(segments.rows) * rank * (width_in + width_out))
    narrow_bias, wide_bias = (as_rows(b) for b in biases or (down[:, 0], up[:, 0]))  # not read where there are none
    matrices = as_rows(down.flatten(1)), narrow_bias, as_rows(up.flatten(1)), wide_bias
    shape = np.uint64(rank), np.uint64(width_in), np.uint64(width_out)
    _cpu(
        as_rows(hidden),
        *matrices,
        segments.blocks,
        shape,
        biases is not None,
        ACTIVATION_CODES[activation],
        as_rows(out),
    )


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _cpu(hidden, down, narrow_bias, up, wide_bias, blocks, shape, has_bias, activation, out):  # type: ignore[no-untyped-def]
    (d, d_stride), (db, db_stride), (u, u_stride), (ub, ub_stride) = down, narrow_bias, up, wide_bias
    rank, width_in, width_out = shape
    padded = (rank + np.uint64(3)) // np.uint64(4) * np.uint64(4)
    for n in numba.prange(blocks.shape[0]):
        p, first, count = blocks[n, 0], blocks[n, 1], blocks[n, 2]
        by_rank = np.zeros(padded * width_in, np.float32)  # transposed: the inner loop runs over neighbouring numbers
        d0 = p * d_stride
        for j in range(rank):
            for k in range(width_in):
                by_rank[j * width_in + k] = d[d0 + k * rank + j]
        narrow = np.zeros((count + np.uint64(1)) * padded, np.float32)
        _narrow(hidden, first, count, by_rank, padded, width_in, narrow)
        for r in range(count):
            for j in range(rank):
                bias = db[p * db_stride + j] if has_bias else np.float32(0.0)
                narrow[r * padded + j] = _activate(narrow[r * padded + j] + bias, activation)
        if count % np.uint64(2) != 0:
            narrow[count * padded :] = np.float32(0.0)
        _widen(narrow, padded, u, p * u_stride, rank, width_out, first, count, out)
        if has_bias:
            y, y_stride = out
            for r in range(count):
                y0, b0 = (first + r) * y_stride, p * ub_stride
                for h in range(width_out):
                    y[y0 + h] += ub[b0 + h]


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _narrow(hidden, first, count, by_rank, padded, width_in, narrow):  # type: ignore[no-untyped-def]
    """narrow[r, j] = sum over k of hidden[first + r, k] * by_rank[j, k]."""
    x, x_stride = hidden
    a = by_rank
    one, two, three, four, depth = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4), np.uint64(_DEPTH)
    for begin in range(np.uint64(0), width_in, depth):
        end = min(begin + depth, width_in)
        for quad in range(padded // four):
            j = quad * four
            a0 = j * width_in
            a1, a2, a3 = a0 + width_in, a0 + two * width_in, a0 + three * width_in
            for pair in range((count + one) // two):
                r = pair * two
                x0 = (first + r) * x_stride
                x1 = x0 + x_stride if r + one < count else x0  # an odd last row is its own partner
                s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = np.float32(0.0)
                for k in range(begin, end):
                    v, w = x[x0 + k], x[x1 + k]
                    s0 += v * a[a0 + k]
                    s1 += v * a[a1 + k]
                    s2 += v * a[a2 + k]
                    s3 += v * a[a3 + k]
                    t0 += w * a[a0 + k]
                    t1 += w * a[a1 + k]
                    t2 += w * a[a2 + k]
                    t3 += w * a[a3 + k]
                n0, n1 = r * padded + j, (r + one) * padded + j
                narrow[n0] += s0
                narrow[n0 + one] += s1
                narrow[n0 + two] += s2
                narrow[n0 + three] += s3
                narrow[n1] += t0
                narrow[n1 + one] += t1
                narrow[n1 + two] += t2
                narrow[n1 + three] += t3


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _widen(narrow, padded, up, slot, rank, width_out, first, count, out):  # type: ignore[no-untyped-def]
    """out[first + r, h] += sum over j of narrow[r, j] * up[slot + j, h]; narrow is 0 where j >= rank or r == count."""
    (y, y_stride), u = out, up
    one, two, three, four = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
    last = rank - one
    for pair in range((count + one) // two):
        r = pair * two
        y0 = (first + r) * y_stride
        y1 = (
            y0 + y_stride if r + one < count else y0 - y_stride * min(r, one)
        )  # an odd last row adds 0 to the one before
        for quad in range(padded // four):
            j = quad * four
            n = r * padded + j
            m = n + padded
            n0, n1, n2, n3 = narrow[n], narrow[n + one], narrow[n + two], narrow[n + three]
            m0, m1, m2, m3 = narrow[m], narrow[m + one], narrow[m + two], narrow[m + three]
            u0 = slot + j * width_out
            u1 = slot + min(j + one, last) * width_out
            u2 = slot + min(j + two, last) * width_out
            u3 = slot + min(j + three, last) * width_out
            for h in range(width_out):
                y[y0 + h] += n0 * u[u0 + h] + n1 * u[u1 + h] + n2 * u[u2 + h] + n3 * u[u3 + h]
                y[y1 + h] += m0 * u[u0 + h] + m1 * u[u1 + h] + m2 * u[u2 + h] + m3 * u[u3 + h]


@numba.njit(nogil=True, cache=True)
def _activate(x, code):  # type: ignore[no-untyped-def]
    if code == _IDENTITY:
        return x
    if code == _RELU:
        return max(x, np.float32(0.0))
    if code == _GELU:
        return np.float32(0.5) * x * (np.float32(1.0) + np.float32(math.erf(x * np.float32(math.sqrt(0.5)))))
    if code == _TANH_GELU:
        inner = np.float32(math.sqrt(2.0 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
        return np.float32(0.5) * x * (np.float32(1.0) + np.float32(math.tanh(inner)))
    if code == _SILU:
        return x / (np.float32(1.0) + np.float32(math.exp(-x)))
    return np.float32(math.tanh(x))
