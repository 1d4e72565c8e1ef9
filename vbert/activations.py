"""The activation functions a backbone, an adapter or a head may name (vbert.config.ACTIVATIONS)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vbert.config import ACTIVATIONS

__all__ = ["activate", "activate_"]


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": torch.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_,
    "gelu_new": partial(torch.ops.aten.gelu_, approximate="tanh"),
    "gelu_pytorch_tanh": partial(torch.ops.aten.gelu_, approximate="tanh"),
    "relu": torch.relu_,
    "silu": partial(F.silu, inplace=True),
    "tanh": torch.tanh_,
    "identity": lambda x: x,
}
assert set(_FUNCTIONS) == set(_IN_PLACE) == set(ACTIVATIONS)


def activate(x: Tensor, name: str) -> Tensor:
    """The named activation of x, any shape; `name` is one of vbert.config.ACTIVATIONS."""
    return _FUNCTIONS[name](x)


def activate_(x: Tensor, name: str) -> Tensor:
    """The same in place, for inference."""
    return _IN_PLACE[name](x)
