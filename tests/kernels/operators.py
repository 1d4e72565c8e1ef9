"""Every operator against its reference, for any backend and device: cases that hurt, and one check an operator."""

from __future__ import annotations

import numpy as np
import torch

from tests.tolerances import OPERATOR
from vbert.batch import Segments
from vbert.kernels.backend import Backend
from vbert.kernels.gather_rows import gather_rows
from vbert.kernels.merge_rows import merge_rows
from vbert.kernels.segmented_affine import segmented_affine
from vbert.kernels.segmented_bottleneck import segmented_bottleneck
from vbert.kernels.segmented_layer_norm import segmented_layer_norm
from vbert.kernels.segmented_low_rank import segmented_low_rank
from vbert.kernels.segmented_sparse import segmented_sparse
from vbert.kernels.slot_attention import slot_attention

SHAPES = {
    "one_row": [1],
    "empty_segment": [3, 0, 2],
    "equal": [8, 8, 8, 8],
    "giant_beside_tiny": [200, 1, 2, 1, 3],
    "zipf": [64, 32, 21, 16, 12, 10, 9, 8, 7, 6, 5, 5, 4, 4, 4],
    "off_the_block": [33, 31, 65],
    "gaps": [64, 32, 21, 16, 12, 10, 9, 8, 7, 6, 5, 5, 4, 4, 4],
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SLOTS = 20


def segments_of(shape, *, slots=SLOTS):
    """Rows of the batch that use the class; `gaps` leaves rows of other tenants between them."""
    lengths = np.array(SHAPES[shape] if isinstance(shape, str) else shape)
    gap = 3 if isinstance(shape, str) and shape == "gaps" else 0
    start = np.cumsum(lengths + gap) - lengths
    return Segments(np.random.default_rng(0).permutation(slots)[: len(lengths)], start, start + lengths)


class Case:
    """Random inputs of one dtype on one device, and the comparison. Slots lie in one arena, one after the other."""

    def __init__(self, segments, dtype, device="cpu", backend=None, *, slots=SLOTS):
        self.segments, self.dtype, self.device, self.backend, self.slots = segments, dtype, device, backend, slots
        self.rows = int(segments.stop[-1]) + 2
        self._generator = torch.Generator().manual_seed(1)

    def normal(self, *shape, scale=1.0):
        return (torch.randn(*shape, generator=self._generator) * scale).to(self.dtype).to(self.device)

    def arena(self, *shapes, scale=0.5, offset=0):
        """Strided views [P, *shape] of one table, each part at a multiple of 16 numbers, as in an arena."""
        sizes = [-(-int(np.prod(shape)) // 16) * 16 for shape in shapes]
        table = self.normal(self.slots, sum(sizes) + offset, scale=scale)[:, offset:]
        starts = np.cumsum([0, *sizes])
        return [table[:, a : a + int(np.prod(s))].unflatten(1, s) for a, s in zip(starts[:-1], shapes, strict=True)]

    def outs(self, *widths, odd=2):
        """Columns of a wider tensor, as q, k and v are; an odd first column allows no vector access."""
        wide = self.normal(self.rows, sum(widths) + 2 * odd)
        starts = odd + np.cumsum([0, *widths])
        return wide, [slice(a, a + w) for a, w in zip(starts[:-1], widths, strict=True)]

    def check(self, operator, *widths, odd=2):
        """operator(outs, backend): both start from the same; rows that belong to nobody must not change."""
        wide, columns = self.outs(*widths, odd=odd)
        got, want = wide.clone(), wide.clone()
        operator([got[:, c] for c in columns], self.backend)
        operator([want[:, c] for c in columns], Backend.REFERENCE)
        self.compare(got, want)
        others = torch.ones_like(wide, dtype=torch.bool)
        for c in columns:
            others[self.segments.rows.to(self.device), c] = False
        assert torch.equal(got[others], wide[others])
        assert not torch.equal(got, wide)

    def compare(self, got, want):
        scale = max(1.0, want.float().abs().max().item())
        worst = (got.float() - want.float()).abs().max().item()
        assert worst <= OPERATOR[self.dtype] * scale, f"off by {worst:.3g} of {scale:.3g}"


def check_low_rank(case, rank=8, width_in=24, width_out=40, *, sites=1, odd=2, offset=0):
    x = case.normal(case.rows, width_in)
    slots = case.arena(*((width_in, rank), (rank, width_out)) * sites, scale=1 / max(1, rank) ** 0.5, offset=offset)
    pairs = list(zip(slots[::2], slots[1::2], strict=True))

    def run(outs, backend):
        given = [(a, b, out) for (a, b), out in zip(pairs, outs, strict=True)]
        segmented_low_rank(x, given, case.segments, backend=backend)

    case.check(run, *[width_out] * sites, odd=odd)


def check_bottleneck(case, rank=5, width=24, activation="gelu", *, odd=2):
    x = case.normal(case.rows, width)
    slots = case.arena((width, rank), (rank,), (rank, width), (width,), scale=1 / rank**0.5)

    def run(outs, backend):
        segmented_bottleneck(x, *slots, case.segments, activation=activation, out=outs[0], backend=backend)

    case.check(run, width, odd=odd)


def check_affine(case, width=40, *, scale=True, shift=True):
    x = case.normal(case.rows, width)
    scales, shifts = case.arena((width,), (width,))

    def run(outs, backend):
        given = (scales if scale else None, shifts if shift else None)
        segmented_affine(x, *given, case.segments, out=outs[0], backend=backend)

    case.check(run, width)


def check_layer_norm(case, width=40):
    x = case.normal(case.rows, width)
    weight, bias = case.arena((width,), (width,))

    def run(outs, backend):
        segmented_layer_norm(x, weight, bias, case.segments, eps=1e-12, out=outs[0], backend=backend)

    case.check(run, width)


def check_sparse(case, width_in=24, width_out=40):
    x = case.normal(case.rows, width_in)
    kept = torch.rand(case.slots, width_out, width_in, generator=torch.Generator().manual_seed(2)) < 0.2
    kept[:, 3] = False  # an output without a non-zero
    starts = torch.zeros(case.slots, width_out + 1, dtype=torch.int32)
    starts[:, 1:] = kept.sum(2).cumsum(1)
    starts += 2  # absolute in the slot
    columns = torch.zeros(case.slots, int(starts.max()), dtype=torch.int32)
    for p in range(case.slots):
        columns[p, 2 : starts[p, -1]] = kept[p].nonzero()[:, 1].to(torch.int32)
    values = case.normal(*columns.shape)
    parts = starts.to(case.device), columns.to(case.device), values

    def run(outs, backend):
        segmented_sparse(x, *parts, case.segments, out=outs[0], backend=backend)

    case.check(run, width_out)


def check_gather(case, width=40, dtype=None):
    table = (case.normal(50, width + 3) * 50).to(dtype or case.dtype)[:, :width]
    index = torch.randint(-1, 50, (77,), generator=torch.Generator().manual_seed(3)).to(case.device)
    index[5] = -1
    got = torch.full((77, width), 7, dtype=table.dtype, device=case.device)
    gather_rows(table, index, out=got, backend=case.backend)
    assert torch.equal(got, gather_rows(table, index, out=torch.empty_like(got), backend=Backend.REFERENCE))


def check_merge(case, width=40, rows_dtype=torch.float16):
    lengths = np.diff(np.concatenate([case.segments.start, case.segments.stop[-1:]]))
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=case.device)
    u = case.normal(int(bounds[-1]), 3, width).to(rows_dtype)
    got = case.normal(len(u), width + 3)[:, :width]
    want = torch.empty_like(got)
    merge_rows(u, bounds, out=got, backend=case.backend)
    case.compare(got, merge_rows(u, bounds, out=want, backend=Backend.REFERENCE))


def check_slot_attention(case, width=48, heads=3, sinks=2):
    m = case.rows
    qkv, constants = case.normal(3 * m, 3 * width), [case.normal(sinks, width).float() for _ in range(2)]
    present = torch.rand(m, 3, generator=torch.Generator().manual_seed(4)) < 0.7
    present[:, 1] = True
    present = present.to(case.device)
    given = (qkv, *constants, present, heads)
    got, want = case.normal(3 * m, width + 3)[:, :width], case.normal(3 * m, width)
    slot_attention(*given, out=got, backend=case.backend)
    case.compare(got, slot_attention(*given, out=want, backend=Backend.REFERENCE))


# What runs over every shape and dtype.
CHECKS = {
    "low_rank_1": lambda case: check_low_rank(case, 1),
    "low_rank_3": lambda case: check_low_rank(case, 3),
    "low_rank_8": lambda case: check_low_rank(case, 8),
    "low_rank_17": lambda case: check_low_rank(case, 17),
    "low_rank_qkv": lambda case: check_low_rank(case, 8, sites=3, odd=8),
    "bottleneck": check_bottleneck,
    "affine": check_affine,
    "affine_scale": lambda case: check_affine(case, shift=False),
    "affine_shift": lambda case: check_affine(case, scale=False),
    "layer_norm": check_layer_norm,
    "sparse": check_sparse,
    "gather_rows": check_gather,
    "merge_rows": check_merge,
    "slot_attention": check_slot_attention,
    "slot_attention_without_sinks": lambda case: check_slot_attention(case, sinks=0),
}
