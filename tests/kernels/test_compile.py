"""Every .cu compiles for the GPUs we name: with nvcc where there is one, and with NVRTC, what cupy uses, always."""

import ctypes
import functools
import importlib.util
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kernels.emulator import FILES, KERNELS
from vbert.kernels import cuda

NVCC = shutil.which("nvcc")
TARGETS = ["sm_80", "sm_90", "compute_80"]  # the last is PTX
SCALARS = sorted(cuda.CODES.values())


@functools.cache
def nvrtc():
    """The compiler as a library, from the wheel that the `dev` extra installs, or from where torch or cupy have it."""
    found = [spec for name in ("nvidia.cuda_nvrtc", "nvidia.cu13") if (spec := _spec(name))]
    folders = [Path(folder) / "lib" for spec in found for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.glob("libnvrtc.so.*"))
    return ctypes.CDLL(str(files[0])) if files else None


def _spec(name):
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None


def compile_with_nvrtc(text, target, scalar):
    """The compiled code. Raises AssertionError with the compiler's log."""
    library, program = nvrtc(), ctypes.c_void_p()
    assert library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None) == 0
    options = [b"-std=c++17", f"-arch={target}".encode(), f"-DSCALAR={scalar}".encode()]
    status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    assert status == 0, result(program, "ProgramLog").decode()
    return result(program, "PTX" if target.startswith("compute") else "CUBIN")


def result(program, what):
    size = ctypes.c_size_t()
    assert getattr(nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert getattr(nvrtc(), f"nvrtcGet{what}")(program, text) == 0
    return text.raw


def used(file, scalar):
    """Whether a file has kernels for this kind of number."""
    return {"two_products_16.cu": scalar != 0, "two_products_32.cu": scalar == 0}.get(file, True)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_nvrtc(file):
    if nvrtc() is None:
        pytest.skip("no libnvrtc: install the `dev` extra")
    variants = [(target, scalar) for scalar in SCALARS for target in TARGETS]
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda variant: compile_with_nvrtc(cuda.source(file), *variant), variants))
    for (_, scalar), code in zip(variants, codes, strict=True):
        assert all(name.encode() in code for name in KERNELS[file]) or not used(file, scalar)


def test_nvrtc_refuses_what_is_wrong():
    if nvrtc() is None:
        pytest.skip("no libnvrtc: install the `dev` extra")
    with pytest.raises(AssertionError, match="nowhere"):
        compile_with_nvrtc('extern "C" __global__ void f(int* p) { *p = nowhere; }', "sm_80", 0)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("file", FILES)
def test_nvcc(file, tmp_path):
    path = Path(cuda.__file__).parent / "csrc" / file
    code = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)]
    code += ["-gencode=arch=compute_80,code=compute_80", "-Werror", "all-warnings"]

    def compile_for(scalar):
        command = [NVCC, "-std=c++17", "-fatbin", f"-DSCALAR={scalar}", *code, "-o", f"{tmp_path}/{scalar}", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    scalars = [scalar for scalar in SCALARS if used(file, scalar)]
    with ThreadPoolExecutor(2) as pool:
        for scalar, done in zip(scalars, pool.map(compile_for, scalars), strict=True):
            assert done.returncode == 0, done.stderr
            assert (tmp_path / str(scalar)).stat().st_size


def test_every_kernel_is_launched_by_an_operator():
    text = "".join(path.read_text() for path in Path(cuda.__file__).parent.glob("*.py"))
    assert all(f'"{name}"' in text for names in KERNELS.values() for name in names)
