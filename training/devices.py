"""Where to train: the `device` of a configuration."""

from __future__ import annotations

import torch

from vbert.errors import ConfigError

__all__ = ["training_device"]


def training_device(name: str) -> torch.device:
    """auto: cuda where torch finds one. Raises ConfigError for a cuda that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda and torch finds none; give cpu or auto", param="device")
    return torch.device(name)
