"""Every operator against its reference, over dtypes and over shapes that hurt."""

import numpy as np
import pytest
import torch

from vbert.batch import Segments
from vbert.config import ACTIVATIONS
from vbert.errors import KernelUnavailable, ShapeError
from vbert.kernels.backend import Backend
from vbert.kernels.segmented_affine import segmented_affine
from vbert.kernels.segmented_bottleneck import segmented_bottleneck
from vbert.kernels.segmented_layer_norm import segmented_layer_norm
from vbert.kernels.segmented_low_rank import segmented_low_rank
from vbert.kernels.segmented_sparse import segmented_sparse

SHAPES = {
    "one_row": [1],
    "empty_segment": [3, 0, 2],
    "equal": [8, 8, 8, 8],
    "giant_beside_tiny": [200, 1, 2, 1, 3],
    "zipf": [64, 32, 21, 16, 12, 10, 9, 8, 7, 6, 5, 5, 4, 4, 4],
    "off_the_block": [33, 31, 65],
}
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 0.06}
IN, OUT, SLOTS = 24, 40, 20


@pytest.fixture(params=[*SHAPES, "gaps"])
def segments(request):
    """Rows of the batch that use the class; `gaps` leaves rows of other tenants between them."""
    lengths = np.array(SHAPES.get(request.param, SHAPES["zipf"]))
    gap = 3 if request.param == "gaps" else 0
    start = np.cumsum(lengths + gap) - lengths
    slot = np.random.default_rng(0).permutation(SLOTS)[: len(lengths)]
    return Segments(slot, start, start + lengths)


@pytest.fixture(params=LIMITS, ids=str)
def case(request, segments):
    """Inputs of one dtype; `out` is columns of a wider tensor, as q, k and v are."""
    rng = torch.Generator().manual_seed(1)
    rows = int(segments.stop[-1]) + 2

    def normal(*shape):
        return torch.randn(*shape, generator=rng).to(request.param)

    return request.param, rows, normal, segments


def check(operator, case, width=OUT):
    """Both backends start from the same `out`; rows that belong to nobody must not change."""
    dtype, rows, normal, segments = case
    before = normal(rows, width + 5)[:, 2 : 2 + width]
    got, want = before.clone(), before.clone()
    operator(out=got, backend=Backend.CPU)
    operator(out=want, backend=Backend.REFERENCE)
    scale = max(1.0, want.float().abs().max().item())
    assert (got.float() - want.float()).abs().max().item() <= LIMITS[dtype] * scale
    nobody = torch.ones(rows, dtype=torch.bool)
    nobody[segments.rows] = False
    assert torch.equal(got[nobody], before[nobody])
    assert not torch.equal(got, before)


@pytest.mark.parametrize("rank", [1, 3, 8, 17])
def test_low_rank(case, rank):
    _, rows, normal, segments = case
    x, a, b = normal(rows, IN), normal(SLOTS, IN, rank), normal(SLOTS, rank, OUT)
    check(lambda **how: segmented_low_rank(x, a, b, segments, **how), case)


def test_low_rank_of_a_wide_input():
    """Wider than what the kernel takes at a time."""
    one = Segments(np.array([1]), np.array([2]), np.array([37]))
    x, a, b, before = torch.randn(40, 700), torch.randn(2, 700, 6), torch.randn(2, 6, OUT), torch.randn(40, OUT)
    got = segmented_low_rank(x, a, b, one, out=before.clone())
    want = segmented_low_rank(x, a, b, one, out=before.clone(), backend=Backend.REFERENCE)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_bottleneck(case, activation):
    _, rows, normal, segments = case
    x = normal(rows, IN)
    slots = normal(SLOTS, IN, 5), normal(SLOTS, 5), normal(SLOTS, 5, OUT), normal(SLOTS, OUT)
    check(lambda **how: segmented_bottleneck(x, *slots, segments, activation=activation, **how), case)


@pytest.mark.parametrize(("has_scale", "has_shift"), [(True, True), (True, False), (False, True)])
def test_affine(case, has_scale, has_shift):
    _, rows, normal, segments = case
    x = normal(rows, OUT)
    scale, shift = normal(SLOTS, OUT), normal(SLOTS, OUT)
    check(
        lambda **how: segmented_affine(x, scale if has_scale else None, shift if has_shift else None, segments, **how),
        case,
    )


def test_layer_norm(case):
    _, rows, normal, segments = case
    x, weight, bias = normal(rows, OUT), normal(SLOTS, OUT), normal(SLOTS, OUT)
    check(lambda **how: segmented_layer_norm(x, weight, bias, segments, eps=1e-12, **how), case)


def test_sparse(case):
    _, rows, normal, segments = case
    x = normal(rows, IN)
    kept = torch.rand(SLOTS, OUT, IN, generator=torch.Generator().manual_seed(2)) < 0.2
    kept[:, 3] = False  # an output without a non-zero
    starts = torch.zeros(SLOTS, OUT + 1, dtype=torch.int32)
    starts[:, 1:] = kept.sum(2).cumsum(1)
    starts += 2  # absolute in the slot
    columns = torch.zeros(SLOTS, int(starts.max()), dtype=torch.int32)
    for p in range(SLOTS):
        columns[p, 2 : starts[p, -1]] = kept[p].nonzero()[:, 1].to(torch.int32)
    values = normal(*columns.shape)
    check(lambda **how: segmented_sparse(x, starts, columns, values, segments, **how), case)


def test_a_bottleneck_may_read_what_it_writes(segments):
    rows = torch.randn(int(segments.stop[-1]) + 2, IN)
    slots = torch.randn(SLOTS, IN, 5), torch.randn(SLOTS, 5), torch.randn(SLOTS, 5, IN), torch.randn(SLOTS, IN)
    want = segmented_bottleneck(rows, *slots, segments, activation="relu", out=rows.clone())
    got = segmented_bottleneck(rows, *slots, segments, activation="relu", out=rows)
    assert torch.equal(got, want)


def test_wrong_shapes_are_refused():
    one = Segments(np.array([0]), np.array([0]), np.array([2]))
    x, out = torch.zeros(2, IN), torch.zeros(2, OUT)
    with pytest.raises(ShapeError):
        segmented_low_rank(x, torch.zeros(1, IN + 1, 2), torch.zeros(1, 2, OUT), one, out=out)
    with pytest.raises(ShapeError):
        segmented_affine(out, None, None, one, out=out)
    with pytest.raises(ShapeError):
        segmented_layer_norm(x, torch.zeros(1, IN + 1), torch.zeros(1, IN), one, eps=1e-5, out=x)
    with pytest.raises(ShapeError):
        segmented_sparse(x, torch.zeros(1, IN), torch.zeros(1, 2), torch.zeros(1, 2), one, out=out)
    down, bias = torch.zeros(1, IN, 2), torch.zeros(1, 2)
    with pytest.raises(ShapeError):
        segmented_bottleneck(x, down, bias, torch.zeros(1, 3, OUT), bias, one, activation="relu", out=out)


def test_a_device_without_operators_is_refused():
    one = Segments(np.array([0]), np.array([0]), np.array([2]))
    x = torch.zeros(2, IN, device="meta")
    with pytest.raises(KernelUnavailable, match="meta"):
        segmented_low_rank(x, torch.zeros(1, IN, 2), torch.zeros(1, 2, IN), one, out=x)
