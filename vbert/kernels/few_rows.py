"""Operator: a shared linear over so few rows that reading the weights is what it costs."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from vbert.errors import ShapeError
from vbert.kernels.backend import Backend
from vbert.kernels.rows import use_threads

__all__ = ["FEW_ROWS", "few_rows_linear", "is_worth_it"]

FEW_ROWS = 24  # measured: half of torch's time at 3 rows, level at 48


def is_worth_it(x: Tensor) -> bool:
    """Whether `few_rows_linear` is faster than a product of torch. x: [T, H_in]."""
    return x.shape[0] <= FEW_ROWS and x.dtype == torch.float32 and x.is_cpu and x.is_contiguous()


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor, backend: Backend | None = None) -> Tensor:
    """out = x W^T + b. A product of torch packs W before it uses it, which for some rows takes longer than the product.

    Args: x: [T, H_in].  weight: [H_out, H_in].  bias: [H_out].  out: [T, H_out]. All contiguous float32 on the CPU.
    Returns: `out`. Raises: ShapeError.
    """
    (count, depth), width = x.shape, out.shape[1]
    if weight.shape != (width, depth) or bias.shape != (width,) or out.shape != (count, width):
        raise ShapeError(f"x {list(x.shape)} by W {list(weight.shape)} + {list(bias.shape)} is not {list(out.shape)}")
    if any(tensor.dtype != torch.float32 or not tensor.is_contiguous() for tensor in (x, weight, bias, out)):
        raise ShapeError(f"a product of few rows takes contiguous float32, got {x.dtype}, {weight.dtype}, {out.dtype}")
    if backend is Backend.REFERENCE:
        return reference(x, weight, bias, out)
    use_threads(count * width * depth)
    _cpu(x.numpy(), weight.numpy(), bias.numpy(), out.numpy())  # not `as_rows`, which takes longer than the product
    return out


def reference(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """Row by row."""
    for row, into in zip(x, out, strict=True):
        into.copy_(weight @ row + bias)
    return out


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _cpu(rows, weights, bias, outs):  # type: ignore[no-untyped-def]
    """Tiles of four outputs by three rows: twelve sums in registers, each number of W loaded once a tile."""
    x, w, y = rows.reshape(-1), weights.reshape(-1), outs.reshape(-1)
    count, width, depth = np.uint64(rows.shape[0]), np.uint64(outs.shape[1]), np.uint64(rows.shape[1])
    xs, ws, ys = depth, depth, width
    one, two, three, four = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
    for tile in numba.prange((width + three) // four):
        o = np.uint64(tile) * four
        if o + four > width:
            for k in range(o, width):
                for t in range(count):
                    total = np.float32(0.0)
                    for i in range(depth):
                        total += w[k * ws + i] * x[t * xs + i]
                    y[t * ys + k] = total + bias[k]
            continue
        w0, w1, w2, w3 = o * ws, (o + one) * ws, (o + two) * ws, (o + three) * ws
        whole = count - count % three
        for t in range(np.uint64(0), whole, three):
            x0, x1, x2 = t * xs, (t + one) * xs, (t + two) * xs
            a0 = a1 = a2 = b0 = b1 = b2 = c0 = c1 = c2 = d0 = d1 = d2 = np.float32(0.0)
            for i in range(depth):
                p, q, r = x[x0 + i], x[x1 + i], x[x2 + i]
                a, b, c, d = w[w0 + i], w[w1 + i], w[w2 + i], w[w3 + i]
                a0 += a * p
                a1 += a * q
                a2 += a * r
                b0 += b * p
                b1 += b * q
                b2 += b * r
                c0 += c * p
                c1 += c * q
                c2 += c * r
                d0 += d * p
                d1 += d * q
                d2 += d * r
            y0, y1, y2 = t * ys + o, (t + one) * ys + o, (t + two) * ys + o
            y[y0], y[y1], y[y2] = a0 + bias[o], a1 + bias[o], a2 + bias[o]
            y[y0 + one], y[y1 + one], y[y2 + one] = b0 + bias[o + one], b1 + bias[o + one], b2 + bias[o + one]
            y[y0 + two], y[y1 + two], y[y2 + two] = c0 + bias[o + two], c1 + bias[o + two], c2 + bias[o + two]
            y[y0 + three], y[y1 + three], y[y2 + three] = (
                d0 + bias[o + three],
                d1 + bias[o + three],
                d2 + bias[o + three],
            )
        for t in range(whole, count):
            x0, y0 = t * xs, t * ys + o
            a0 = b0 = c0 = d0 = np.float32(0.0)
            for i in range(depth):
                p = x[x0 + i]
                a0 += w[w0 + i] * p
                b0 += w[w1 + i] * p
                c0 += w[w2 + i] * p
                d0 += w[w3 + i] * p
            y[y0], y[y0 + one] = a0 + bias[o], b0 + bias[o + one]
            y[y0 + two], y[y0 + three] = c0 + bias[o + two], d0 + bias[o + three]
