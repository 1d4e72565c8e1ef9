"""The CUDA kernels and the code that launches them, without a GPU: their own text, compiled for the host."""

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from tests.kernels import emulator
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
from vbert.errors import ShapeError
from vbert.kernels import backend, cuda
from vbert.kernels.backend import Backend
from vbert.kernels.segmented_bottleneck import segmented_bottleneck
from vbert.kernels.warm_up import warm_up

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="no C++ compiler (g++ or clang++) on PATH")


@pytest.fixture(autouse=True)
def _emulator(monkeypatch):
    monkeypatch.setattr(cuda, "launcher", emulator.launch)


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def case_of(shape, dtype, **how):
    return Case(segments_of(shape, **how), dtype, backend=Backend.CUDA, **how)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("check", CHECKS)
def test_operator(check, shape, dtype):
    CHECKS[check](case_of(shape, dtype))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation, dtype):
    check_bottleneck(case_of("equal", dtype), activation=activation)


@pytest.mark.parametrize("rank", [7, 16, 64, 65, 100])
def test_ranks(rank, dtype):
    check_low_rank(case_of([33, 1], dtype), rank, width_in=40, width_out=136)


@pytest.mark.parametrize("odd", [0, 1, 8])
@pytest.mark.parametrize("widths", [(384, 384), (768, 40), (17, 33), (1, 1), (130, 129)], ids=str)
def test_widths_and_alignments(widths, odd, dtype):
    """Vector accesses and plain ones, one chunk and several, columns that begin anywhere."""
    check_low_rank(case_of([5, 33], dtype), 8, *widths, odd=odd)
    check_low_rank(case_of([5], dtype), 24, *widths, odd=odd, offset=3)


def test_ten_thousand_slots(dtype):
    lengths = np.random.default_rng(0).integers(0, 3, 60)
    check_low_rank(case_of(lengths, dtype, slots=10_000), 8)


def test_a_bottleneck_as_it_is_served(dtype):
    check_bottleneck(case_of([40], dtype), 64, 384, odd=0)


@pytest.mark.parametrize("rank", [16, 100])
def test_a_bottleneck_may_read_what_it_writes(rank, dtype):
    case = case_of("zipf", dtype)
    rows = case.normal(case.rows, 24)
    slots = case.arena((24, rank), (rank,), (rank, 24), (24,), scale=1 / rank**0.5)
    how = {"activation": "relu", "backend": Backend.CUDA}
    want = segmented_bottleneck(rows, *slots, case.segments, out=rows.clone(), **how)
    assert torch.equal(segmented_bottleneck(rows, *slots, case.segments, out=rows, **how), want)


def test_a_sparse_change_wider_than_a_chunk(dtype):
    check_sparse(case_of([33], dtype, slots=2), 600, 70)


@pytest.mark.parametrize("width", [1, 7, 40, 64])
@pytest.mark.parametrize("stored", [torch.uint8, torch.float16, torch.float64], ids=str)
def test_rows_of_any_dtype_are_gathered(stored, width):
    check_gather(case_of("one_row", torch.float32), width, stored)


@pytest.mark.parametrize("stored", DTYPES.values(), ids=str)
def test_rows_of_any_dtype_are_merged(stored, dtype):
    check_merge(case_of("zipf", dtype), rows_dtype=stored)


def test_padding_blocks_belong_to_nobody(dtype):
    """A captured graph has more blocks than a batch needs: those of no rows change nothing."""
    case = case_of([3, 40], dtype)
    blocks = case.segments.device_blocks(torch.device("cpu"))
    case.segments._device_blocks = torch.cat([blocks, torch.tensor([[0, 0, 0]] * 3, dtype=torch.int32)])
    for check in ("low_rank_8", "bottleneck", "affine", "layer_norm", "sparse"):
        CHECKS[check](case)


def test_what_a_kernel_cannot_take_is_refused():
    case = case_of([3], torch.float64)
    with pytest.raises(ShapeError, match="float64"):
        check_low_rank(case)
    with pytest.raises(ShapeError, match="one dtype"):
        cuda.addresses(torch.zeros(2), torch.zeros(2, dtype=torch.int32), None, torch.zeros(2, dtype=torch.float16))
    with pytest.raises(ShapeError, match="neighbouring"):
        cuda.address(torch.zeros(4, 4).t())


def broken(file):
    """The text of a kernel without one of its barriers or waits, for each of them."""
    text = cuda.source(file)
    for found in re.finditer(r"__syncthreads\(\);|wait_copies<\d>\(\);", text):
        yield text[: found.start()] + ";" + text[found.end() :]


def check_in_chunks(file, dtype):
    """Several chunks of everything, in two blocks: copies that come late, and early ones."""
    if file == "sparse.cu":
        check_sparse(case_of([32, 32], dtype), 600, 70)
    else:
        check_low_rank(case_of([32, 32], dtype), 100, 1536, 400)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["two_products_16.cu", "two_products_32.cu", "sparse.cu"])
def test_no_barrier_and_no_wait_can_be_left_out(file, monkeypatch):
    """The emulator sees what it is there for, and no kernel waits in vain."""
    dtype = torch.float32 if file == "two_products_32.cu" else torch.bfloat16
    check_in_chunks(file, dtype)
    build = partial(emulator.build, kernels=emulator.KERNELS[file], scalar=cuda.CODES[dtype])
    with ThreadPoolExecutor(2) as pool:  # the compiler is a process of its own
        libraries = list(pool.map(build, broken(file)))
    for library in libraries:
        monkeypatch.setattr(cuda, "launcher", partial(run_in, library))
        with pytest.raises(AssertionError):
            check_in_chunks(file, dtype)


def run_in(library, file, kernel, scalar, arguments, grid, shared_bytes, device):
    emulator.run(library, kernel, arguments, grid, shared_bytes)


def test_the_warm_up_launches_every_kernel(dtype, monkeypatch):
    launched = set()

    def launch(file, kernel, *how):
        launched.add(kernel)
        emulator.launch(file, kernel, *how)

    monkeypatch.setattr(cuda, "launcher", launch)
    monkeypatch.setitem(backend.OF_DEVICE, "cpu", Backend.CUDA)
    warm_up(dtype)
    two_products = {"two_products_32"} if dtype is torch.float32 else {"two_products_16", "two_products_64"}
    rest = {name for names in emulator.KERNELS.values() for name in names if "two_products" not in name}
    assert launched == two_products | rest
