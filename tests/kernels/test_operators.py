"""Every operator on the CPU against its reference, over dtypes and over shapes that hurt."""

import numpy as np
import pytest
import torch

from tests.kernels.operators import (
    CHECKS,
    SHAPES,
    Case,
    check_bottleneck,
    check_gather,
    check_low_rank,
    check_merge,
    segments_of,
)
from vbert.batch import Segments
from vbert.config import ACTIVATIONS
from vbert.errors import KernelUnavailable, ShapeError
from vbert.kernels.backend import Backend
from vbert.kernels.few_rows import few_rows_linear, is_worth_it
from vbert.kernels.gather_rows import gather_rows
from vbert.kernels.mean_rows import mean_rows, unit_rows
from vbert.kernels.merge_rows import merge_rows
from vbert.kernels.segmented_affine import segmented_affine
from vbert.kernels.segmented_bottleneck import segmented_bottleneck
from vbert.kernels.segmented_layer_norm import segmented_layer_norm
from vbert.kernels.segmented_low_rank import segmented_low_rank
from vbert.kernels.segmented_sparse import segmented_sparse

DTYPES = [torch.float32, torch.bfloat16]
IN, OUT = 24, 40


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("check", CHECKS)
def test_operator(check, shape, dtype):
    CHECKS[check](Case(segments_of(shape), dtype, backend=Backend.CPU))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("shape", ["zipf", [17]], ids=str)
def test_activations(activation, shape, dtype):
    check_bottleneck(Case(segments_of(shape), dtype, backend=Backend.CPU), activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[0, 7, 0], [40]], ids=str)
@pytest.mark.parametrize("check", ["low_rank_3", "low_rank_qkv", "bottleneck"])
def test_the_only_tenant_of_a_batch(check, lengths, dtype):
    segments = segments_of(lengths)
    segments.start[:], segments.stop[:] = segments.start + 3, segments.stop + 3  # rows of others come before
    CHECKS[check](Case(segments, dtype, backend=Backend.CPU))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[20, 17], [20], [40]], ids=str)
def test_low_rank_of_a_wide_input(lengths, dtype):
    """Wider than what the kernel takes at a time; on either side of what one tenant computes in float32."""
    check_low_rank(Case(segments_of(lengths), dtype, backend=Backend.CPU), rank=12, width_in=700)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 7, 40])
def test_rows_of_any_dtype_are_gathered(dtype, width):
    check_gather(Case(segments_of("one_row"), torch.float32, backend=Backend.CPU), width, dtype)


@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_any_dtype_are_merged(rows_dtype):
    check_merge(Case(segments_of("zipf"), torch.float32, backend=Backend.CPU), rows_dtype=rows_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 384])
def test_means_of_sequences(width, dtype):
    x = torch.randn(40, width + 3, generator=torch.Generator().manual_seed(0)).to(dtype)[:, 3:]  # strided
    cu_seqlens = np.array([0, 1, 18, 40])
    want = mean_rows(x, cu_seqlens, out=torch.empty(3, width), backend=Backend.REFERENCE)
    got = mean_rows(x, cu_seqlens, out=torch.full((3, width), torch.nan))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    alone = mean_rows(x[1:18], np.array([0, 17]), out=torch.empty(1, width))
    assert torch.equal(alone[0], got[1])


def test_rows_of_length_one():
    x = torch.randn(5, 39, generator=torch.Generator().manual_seed(0))
    x[2] = 0
    want = unit_rows(x, out=torch.empty(5, 39), backend=Backend.REFERENCE)
    torch.testing.assert_close(unit_rows(x, out=torch.full((5, 39), torch.nan)), want)
    torch.testing.assert_close(want, torch.nn.functional.normalize(x, dim=1))
    torch.testing.assert_close(unit_rows(x, out=x), want)


def test_means_that_do_not_fit():
    x = torch.zeros(4, 8)
    with pytest.raises(ShapeError, match="means of 2 sequences"):
        mean_rows(x, np.array([0, 1, 4]), out=torch.zeros(1, 8))
    with pytest.raises(ShapeError, match="unit rows"):
        unit_rows(x.bfloat16(), out=x)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 24])
@pytest.mark.parametrize(("width", "depth"), [(1, 1), (4, 8), (7, 5), (36, 33), (96, 384)])
def test_a_product_of_few_rows(rows, width, depth):
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((rows, depth), (width, depth), (width,)))
    got = few_rows_linear(x, weight, bias, out=torch.full((rows, width), torch.nan))
    want = few_rows_linear(x, weight, bias, out=torch.empty(rows, width), backend=Backend.REFERENCE)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    assert is_worth_it(x)
    assert not any(map(is_worth_it, (torch.zeros(25, 8), x.bfloat16(), torch.zeros(8, 4).t())))


def test_every_half_is_read_as_torch_reads_it():
    u = torch.zeros(1 << 16, 3, 1, dtype=torch.float16)
    u[:, 1, 0] = torch.arange(1 << 16).to(torch.uint16).view(torch.float16)
    apart = torch.arange(len(u) + 1, dtype=torch.int32)  # every sequence is one token
    got = merge_rows(u, apart, out=torch.empty(len(u), 1))
    assert torch.equal(got.nan_to_num(nan=1e9), u[:, 1].float().nan_to_num(nan=1e9))


def test_a_bottleneck_may_read_what_it_writes():
    segments = segments_of("zipf")
    rows = torch.randn(int(segments.stop[-1]) + 2, IN)
    slots = torch.randn(20, IN, 5), torch.randn(20, 5), torch.randn(20, 5, IN), torch.randn(20, IN)
    want = segmented_bottleneck(rows, *slots, segments, activation="relu", out=rows.clone())
    got = segmented_bottleneck(rows, *slots, segments, activation="relu", out=rows)
    assert torch.equal(got, want)


def test_wrong_shapes_are_refused():
    one = Segments(np.array([0]), np.array([0]), np.array([2]))
    x, out = torch.zeros(2, IN), torch.zeros(2, OUT)
    with pytest.raises(ShapeError):
        segmented_low_rank(x, [(torch.zeros(1, IN + 1, 2), torch.zeros(1, 2, OUT), out)], one)
    with pytest.raises(ShapeError):
        segmented_affine(out, None, None, one, out=out)
    with pytest.raises(ShapeError):
        segmented_layer_norm(x, torch.zeros(1, IN + 1), torch.zeros(1, IN), one, eps=1e-5, out=x)
    with pytest.raises(ShapeError):
        segmented_sparse(x, torch.zeros(1, IN), torch.zeros(1, 2), torch.zeros(1, 2), one, out=out)
    down, bias = torch.zeros(1, IN, 2), torch.zeros(1, 2)
    with pytest.raises(ShapeError):
        segmented_bottleneck(x, down, bias, torch.zeros(1, 3, OUT), bias, one, activation="relu", out=out)
    with pytest.raises(ShapeError):
        gather_rows(x, torch.zeros(2), out=x.clone())
    with pytest.raises(ShapeError):
        merge_rows(x, torch.zeros(2, dtype=torch.int32), out=x)
    with pytest.raises(ShapeError, match="by W"):
        few_rows_linear(x, torch.zeros(OUT, IN + 1), torch.zeros(OUT), out=out)
    with pytest.raises(ShapeError, match="contiguous float32"):
        few_rows_linear(x, torch.zeros(IN, OUT).t(), torch.zeros(OUT), out=out)


def test_a_device_without_operators_is_refused():
    one = Segments(np.array([0]), np.array([0]), np.array([2]))
    x = torch.zeros(2, IN, device="meta")
    with pytest.raises(KernelUnavailable, match="meta"):
        segmented_low_rank(x, [(torch.zeros(1, IN, 2), torch.zeros(1, 2, IN), x)], one)


def test_a_cuda_kernel_refuses_tensors_of_the_host():
    one = Segments(np.array([0]), np.array([0]), np.array([2]))
    x = torch.zeros(2, IN)
    with pytest.raises(KernelUnavailable, match="cpu"):
        segmented_affine(x, x[:1], None, one, out=x, backend=Backend.CUDA)
