"""Which implementation of an operator runs. A missing backend is an error; nothing falls back in silence."""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from vbert.errors import KernelUnavailable

__all__ = ["OF_DEVICE", "Backend", "pick"]


class Backend(Enum):
    REFERENCE = "reference"  # the docstring equation, loops welcome, any device
    CPU = "cpu"
    CUDA = "cuda"


OF_DEVICE = {"cpu": Backend.CPU, "cuda": Backend.CUDA}


def pick(backend: Backend | None, tensor: Tensor) -> Backend:
    """The backend to use for a tensor: the one asked for, or the one of its device."""
    if backend is not None:
        return backend
    if tensor.device.type not in OF_DEVICE:
        raise KernelUnavailable(f"no operator runs on {tensor.device.type!r}; use device='cpu' or 'cuda'")
    return OF_DEVICE[tensor.device.type]
