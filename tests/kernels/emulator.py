"""The CUDA kernels without a GPU: their own text, compiled by the host's C++ compiler behind emulator.hpp."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from vbert.kernels import cuda

__all__ = ["COMPILER", "FILES", "KERNELS", "build", "launch", "run"]

COMPILER = shutil.which("g++") or shutil.which("clang++")
FILES = sorted(path.name for path in (Path(cuda.__file__).parent / "csrc").glob("*.cu"))
_KERNEL = re.compile(r"__global__ void(?: __launch_bounds__\(.*?\))? (\w+)\(const __grid_constant__ (\w+)")
KERNELS = {file: [name for name, _ in _KERNEL.findall(cuda.source(file))] for file in FILES}


def launch(file, kernel, scalar, arguments, grid, shared_bytes, device):
    """A `Launcher` for tensors in host memory."""
    assert device.type == "cpu"
    run(_library(file, scalar), kernel, arguments, grid, shared_bytes)


def run(library, kernel, arguments, grid, shared_bytes):
    size = getattr(library, f"run_{kernel}")(
        ctypes.c_void_p(arguments.ctypes.data), ctypes.c_size_t(arguments.nbytes), *grid, cuda.THREADS, shared_bytes
    )
    assert size >= 0, f"{kernel} did what a GPU forbids; stderr says what"
    assert size == 0, f"{kernel} takes a struct of {size} bytes, got {arguments.nbytes}"


@functools.cache
def _library(file, scalar):
    # Once a process: about a second.
    return build(cuda.source(file), KERNELS[file], scalar)


def build(text, kernels, scalar):
    """A library with `run_KERNEL` for each kernel in `text`."""
    text = '#include "emulator.hpp"\n' + text
    runner = 'extern "C" int run_{0}(const void* a, size_t n, int x, int y, int threads, int shared) {{\n'
    runner += "    return emulator::run({0}, a, n, x, y, threads, shared);\n}}\n"
    folder = Path(tempfile.mkdtemp(prefix="vbert-emulator-"))
    try:
        (folder / "kernel.cpp").write_text(text + "".join(runner.format(name) for name in kernels))
        command = [
            COMPILER,
            "-std=c++17",
            "-O1",
            "-fno-strict-aliasing",
            "-fPIC",
            "-shared",
            f"-DSCALAR={scalar}",
            "-w",
        ]
        command += ["-I", str(Path(__file__).parent), "-o", str(folder / "kernel.so"), str(folder / "kernel.cpp")]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(folder / "kernel.so"))
    finally:
        shutil.rmtree(folder)
