"""From the text of csrc/ to a launch: cupy compiles with NVRTC on first use, a kernel takes one struct by value.

Kernels see raw addresses and strides, so cupy need not know bfloat16, and nothing is copied or converted. They are
launched on torch's current stream and nothing waits for them. cupy is imported here only, when the first kernel is.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vbert.errors import KernelUnavailable, ShapeError

__all__ = [
    "CODES",
    "THREADS",
    "Launcher",
    "address",
    "addresses",
    "check_available",
    "cupy_is_installed",
    "describe",
    "launch",
    "launcher",
    "source",
]

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # SCALAR of csrc/device.cuh
THREADS = 256  # of a thread block, for every kernel
_FOLDER = Path(__file__).parent / "csrc"
_PLAIN_SHARED_BYTES = 48 << 10  # more must be asked for


def check_available() -> None:
    """Raises KernelUnavailable where no GPU can be used, with what is missing."""
    if not torch.cuda.is_available():
        raise KernelUnavailable("torch sees no CUDA device; install a CUDA build of torch, or use device='cpu'")
    _cupy()


def cupy_is_installed() -> bool:
    """Without importing it, which takes a second."""
    return bool(sys.modules["cupy"] if "cupy" in sys.modules else importlib.util.find_spec("cupy"))


def source(file: str) -> str:
    """The text of one file of csrc/ with its own includes put in: one text, as NVRTC wants it."""
    return _expanded(file, set())


def _expanded(file: str, seen: set[str]) -> str:
    if file in seen:
        return ""
    seen.add(file)
    text = (_FOLDER / file).read_text().replace("#pragma once\n", "")
    return re.sub(r'#include "(.*)"\n', lambda found: _expanded(found[1], seen), text)


def describe(**fields: str) -> np.dtype[Any]:
    """The layout of a kernel's struct, aligned as C does: p address, l 64-bit, i 32-bit integer, f float32."""
    types = {"p": "u8", "l": "i8", "i": "i4", "f": "f4"}
    return np.dtype([(name, types[kind]) for name, kind in fields.items()], align=True)


def address(tensor: Tensor | None) -> int:
    """Where a tensor begins; 0 for None. Raises ShapeError where its last dimension is not contiguous."""
    if tensor is None:
        return 0
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ShapeError(f"a CUDA kernel takes rows of neighbouring numbers, got strides {tensor.stride()}")
    return tensor.data_ptr()


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    """`address` of each. Raises ShapeError where the floats are not all of one dtype, or not all on one device."""
    given = [tensor for tensor in tensors if tensor is not None]
    floats = {tensor.dtype for tensor in given if tensor.is_floating_point()}
    devices = {tensor.device for tensor in given}
    if len(floats) > 1 or len(devices) > 1:
        raise ShapeError(f"a CUDA kernel takes one dtype on one device, got {[*floats]} on {[*map(str, devices)]}")
    return tuple(map(address, tensors))


class Launcher(Protocol):
    """Runs one kernel; tests put one in place that needs no GPU."""

    def __call__(
        self,
        file: str,
        kernel: str,
        scalar: int,
        arguments: NDArray[Any],
        grid: tuple[int, int],
        shared_bytes: int,
        device: torch.device,
    ) -> None: ...


def launch(
    kernel: str,
    arguments: NDArray[Any],
    out: Tensor,
    grid: tuple[int, int],
    *,
    file: str | None = None,
    dtype: torch.dtype | None = None,
    shared_bytes: int = 0,
) -> None:
    """Run a kernel of `csrc/<file>.cu` with one struct [1] by value, compiled for `dtype`, that of `out` unless given.

    Raises KernelUnavailable; ShapeError for another dtype than float32, float16 and bfloat16.
    """
    dtype = out.dtype if dtype is None else dtype
    if dtype not in CODES:
        raise ShapeError(f"a CUDA kernel takes float32, float16 or bfloat16, got {dtype}")
    if grid[0] and grid[1]:
        launcher(f"{file or kernel}.cu", kernel, CODES[dtype], arguments, grid, shared_bytes, out.device)


def _launch_with_cupy(
    file: str,
    kernel: str,
    scalar: int,
    arguments: NDArray[Any],
    grid: tuple[int, int],
    shared_bytes: int,
    device: torch.device,
) -> None:
    if device.type != "cuda":
        raise KernelUnavailable(f"a CUDA kernel takes tensors on a cuda device, got {device}; use backend=None")
    function = _compiled(file, kernel, scalar, shared_bytes, device)
    stream = SimpleNamespace(ptr=torch.cuda.current_stream(device).cuda_stream)
    function((*grid, 1), (THREADS, 1, 1), (arguments,), shared_bytes, stream)


@functools.cache
def _compiled(file: str, kernel: str, scalar: int, shared_bytes: int, device: torch.device) -> Any:
    """A cupy Function of the device. cupy keeps compiled modules on disk, so a second process only loads them."""
    with _cupy().cuda.Device(device.index or 0):
        raw = _module(file, scalar).get_function(kernel)
        if shared_bytes > _PLAIN_SHARED_BYTES:
            raw.max_dynamic_shared_size_bytes = shared_bytes
        return raw.kernel


@functools.cache
def _module(file: str, scalar: int) -> Any:
    return _cupy().RawModule(code=source(file), options=("-std=c++17", f"-DSCALAR={scalar}"))


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        major = (torch.version.cuda or "13").split(".")[0]
        raise KernelUnavailable(
            f"operators on a cuda device need cupy, which cannot be imported ({error}); "
            f"install vbert[cuda{major}], or use device='cpu'"
        ) from error
    return cupy


launcher: Launcher = _launch_with_cupy
