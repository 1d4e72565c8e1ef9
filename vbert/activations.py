"""The activation functions a backbone, an adapter or a head may name (vbert.config.ACTIVATIONS)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vbert.config import ACTIVATIONS

__all__ = ["activate"]


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": torch.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
assert set(_FUNCTIONS) == set(ACTIVATIONS)


def activate(x: Tensor, name: str) -> Tensor:
    """The named activation of x, any shape; `name` is one of vbert.config.ACTIVATIONS."""
    return _FUNCTIONS[name](x)
