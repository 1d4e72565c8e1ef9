"""Operator: each tenant's scale and shift of its own rows of a packed batch."""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from vbert.batch import Segments
from vbert.errors import ShapeError
from vbert.kernels.backend import Backend, pick
from vbert.kernels.cuda import addresses, describe, launch
from vbert.kernels.rows import as_rows, load, store, use_threads

__all__ = ["segmented_affine"]

_ARGUMENTS = describe(
    **dict.fromkeys(("blocks", "x", "scale", "shift", "out"), "p"),
    **dict.fromkeys(("x_stride", "scale_stride", "shift_stride", "out_stride"), "l"),
    width="i",
)


def segmented_affine(
    rows: Tensor,
    scale_slots: Tensor | None,
    shift_slots: Tensor | None,
    segments: Segments,
    *,
    out: Tensor,
    backend: Backend | None = None,
) -> Tensor:
    """Scale and shift each tenant's own rows; rows of nobody stay as they are in `out`.

    For segment s with rows i:j and slot p: out[i:j] = rows[i:j] * scale_slots[p] + shift_slots[p]

    Args:
        rows: [T, H] float32 or bfloat16, on a GPU also float16; may be `out` itself.
        out: [T, H], may be columns of a wider tensor.
        scale_slots, shift_slots: [P, H] strided views of the arena; None: not there. At least one is given.
    Returns: `out`. Raises: ShapeError, KernelUnavailable.
    Source: IA3, Liu et al. 2022, arXiv:2205.05638; BitFit, Ben Zaken et al. 2021, arXiv:2106.10199.
    """
    given = [slots for slots in (scale_slots, shift_slots) if slots is not None]
    if not given or any(slots.shape[1] != rows.shape[1] for slots in given) or rows.shape != out.shape:
        raise ShapeError(f"slots {[list(g.shape) for g in given]} do not fit {list(rows.shape)} -> {list(out.shape)}")
    chosen = pick(backend, rows)
    if chosen is Backend.REFERENCE:
        return reference(rows, scale_slots, shift_slots, segments, out)
    if chosen is Backend.CUDA:
        return _cuda(rows, scale_slots, shift_slots, segments, out)
    scale, shift = (as_rows(given[0] if slots is None else slots) for slots in (scale_slots, shift_slots))
    use_threads(out.shape[1] * len(segments.rows))
    given_flags = scale_slots is not None, shift_slots is not None
    _cpu(as_rows(rows), scale, shift, segments.row_index, as_rows(out), np.uint64(out.shape[1]), *given_flags)
    return out


def reference(
    rows: Tensor, scale_slots: Tensor | None, shift_slots: Tensor | None, segments: Segments, out: Tensor
) -> Tensor:
    for p, i, j in zip(segments.slot, segments.start, segments.stop, strict=True):
        y = rows[i:j].float()
        y = y if scale_slots is None else y * scale_slots[p].float()
        out[i:j] = (y if shift_slots is None else y + shift_slots[p].float()).to(out.dtype)
    return out


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract"})
def _cpu(rows, scale, shift, row_index, out, width, has_scale, has_shift):  # type: ignore[no-untyped-def]
    (x, x_stride), (g, g_stride), (b, b_stride), (y, y_stride) = rows, scale, shift, out
    for n in numba.prange(row_index.shape[0]):
        t, p = row_index[n, 0], row_index[n, 1]
        x0, y0, g0, b0 = t * x_stride, t * y_stride, p * g_stride, p * b_stride
        if has_scale and has_shift:
            for h in range(width):
                store(y, y0 + h, load(x[x0 + h]) * load(g[g0 + h]) + load(b[b0 + h]))
        elif has_scale:
            for h in range(width):
                store(y, y0 + h, load(x[x0 + h]) * load(g[g0 + h]))
        else:
            for h in range(width):
                store(y, y0 + h, load(x[x0 + h]) + load(b[b0 + h]))


def _cuda(
    rows: Tensor, scale_slots: Tensor | None, shift_slots: Tensor | None, segments: Segments, out: Tensor
) -> Tensor:
    blocks = segments.device_blocks(rows.device)
    tensors = (rows, scale_slots, shift_slots, out)
    strides = (0 if tensor is None else tensor.stride(0) for tensor in tensors)
    row = (*addresses(blocks, *tensors), *strides, out.shape[1])
    launch("affine", np.array([row], _ARGUMENTS), out, (len(blocks), 1))
    return out
