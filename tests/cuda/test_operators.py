"""Every CUDA operator on a real device against its reference. Needs torch, cupy, pytest and nothing else."""

import numpy as np
import pytest
import torch

from tests.kernels.operators import (
    CHECKS,
    DTYPES,
    SHAPES,
    Case,
    check_bottleneck,
    check_gather,
    check_low_rank,
    check_merge,
    check_sparse,
    segments_of,
)
from vbert.config import ACTIVATIONS

pytestmark = pytest.mark.cuda


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def case_of(shape, dtype, **how):
    return Case(segments_of(shape, **how), dtype, "cuda", **how)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("check", CHECKS)
def test_operator(check, shape, dtype):
    CHECKS[check](case_of(shape, dtype))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation, dtype):
    check_bottleneck(case_of("zipf", dtype), activation=activation)


@pytest.mark.parametrize("rank", [1, 7, 8, 16, 64, 65, 100])
@pytest.mark.parametrize("odd", [0, 1, 8])
@pytest.mark.parametrize("widths", [(384, 384), (384, 1536), (1536, 384), (768, 768), (17, 33), (1, 1)], ids=str)
def test_ranks_and_widths(rank, widths, odd, dtype):
    check_low_rank(case_of("giant_beside_tiny", dtype), rank, *widths, odd=odd)


def test_ten_thousand_slots(dtype):
    lengths = np.random.default_rng(0).integers(0, 5, 1000)
    check_low_rank(case_of(lengths, dtype, slots=10_000), 8, 384, 384, sites=3, odd=8)
    check_bottleneck(case_of(lengths, dtype, slots=10_000), 64, 64, odd=0)


def test_zipf_of_a_large_batch(dtype):
    lengths = np.maximum(1, 1200 // np.arange(1, 300))
    check_low_rank(case_of(lengths, dtype, slots=300), 8, 384, 384, sites=3, odd=8)
    check_bottleneck(case_of(lengths, dtype, slots=300), 64, 768, odd=0)
    check_sparse(case_of(lengths, dtype, slots=300), 384, 100)


@pytest.mark.parametrize("stored", [torch.uint8, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 7, 40, 384])
def test_rows_of_any_dtype_are_gathered(stored, width):
    check_gather(case_of("one_row", torch.float32), width, stored)


@pytest.mark.parametrize("stored", DTYPES.values(), ids=str)
def test_rows_of_any_dtype_are_merged(stored, dtype):
    check_merge(case_of("zipf", dtype), 384, stored)


def test_another_stream(dtype):
    """Kernels run where torch runs: behind the work that is already on the current stream."""
    case = case_of("zipf", dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000)
        check_low_rank(case, 8, 384, 384)
    stream.synchronize()
