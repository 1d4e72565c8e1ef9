"""Compile every kernel before anybody waits for it."""

from __future__ import annotations

import numpy as np
import torch

from vbert.batch import Segments
from vbert.kernels.segmented_affine import segmented_affine
from vbert.kernels.segmented_bottleneck import segmented_bottleneck
from vbert.kernels.segmented_layer_norm import segmented_layer_norm
from vbert.kernels.segmented_low_rank import segmented_low_rank
from vbert.kernels.segmented_sparse import segmented_sparse

__all__ = ["warm_up"]


def warm_up(dtype: torch.dtype) -> None:
    """Run each operator once: seconds where numba's cache is empty, in a new checkout, else a fraction of one."""
    one = Segments(np.array([0]), np.array([0]), np.array([2]))

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    x, wide, narrow, down, up = zeros(2, 8), zeros(1, 8), zeros(1, 4), zeros(1, 8, 4), zeros(1, 4, 8)
    starts, columns = torch.zeros(1, 9, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int32)
    segmented_low_rank(x, down, up, one, out=zeros(2, 8))
    segmented_bottleneck(x, down, narrow, up, wide, one, activation="relu", out=zeros(2, 8))
    segmented_affine(x, wide, wide, one, out=zeros(2, 8))
    segmented_layer_norm(x, wide, wide, one, eps=1e-5, out=zeros(2, 8))
    segmented_sparse(x, starts, columns, narrow, one, out=zeros(2, 8))
