"""Compile every kernel before anybody waits for it."""

from __future__ import annotations

import numpy as np
import torch

from vbert.batch import Segments
from vbert.kernels.few_rows import few_rows_linear
from vbert.kernels.gather_rows import gather_rows
from vbert.kernels.mean_rows import mean_rows, unit_rows
from vbert.kernels.merge_rows import merge_rows
from vbert.kernels.segmented_affine import segmented_affine
from vbert.kernels.segmented_bottleneck import segmented_bottleneck
from vbert.kernels.segmented_layer_norm import segmented_layer_norm
from vbert.kernels.segmented_low_rank import segmented_low_rank
from vbert.kernels.segmented_sparse import segmented_sparse
from vbert.kernels.slot_attention import slot_attention

__all__ = ["warm_up"]


def warm_up(dtype: torch.dtype, device: torch.device | None = None) -> None:
    """Run each operator once: seconds where the cache of numba or cupy is empty, in a new checkout, else a fraction."""
    device = torch.device("cpu") if device is None else device
    one = Segments(np.array([0]), np.array([0]), np.array([2]))
    two = Segments(np.array([0, 0]), np.array([0, 1]), np.array([1, 2]))  # one alone takes no kernel of ours on a CPU

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    if device.type == "cpu":
        if dtype != torch.float16:  # no CPU computes in it
            mean_rows(zeros(1, 8), np.array([0, 1]), out=torch.zeros(1, 8))
        unit_rows(torch.zeros(1, 8), out=torch.zeros(1, 8))
        few_rows_linear(*(torch.zeros(shape) for shape in ((1, 8), (4, 8), (4,))), out=torch.zeros(1, 4))
    x, wide, narrow, down, up = zeros(2, 8), zeros(1, 8), zeros(1, 4), zeros(1, 8, 4), zeros(1, 4, 8)
    starts, columns = zeros(1, 9, dtype=torch.int32), zeros(1, 4, dtype=torch.int32)
    segmented_low_rank(x, [(down, up, zeros(2, 8))], two)
    segmented_low_rank(x, [(zeros(1, 8, 17), zeros(1, 17, 8), zeros(2, 8))], two)  # on a GPU another kernel
    segmented_bottleneck(x, down, narrow, up, wide, two, activation="relu", out=zeros(2, 8))
    segmented_affine(x, wide, wide, one, out=zeros(2, 8))
    segmented_layer_norm(x, wide, wide, one, eps=1e-5, out=zeros(2, 8))
    segmented_sparse(x, starts, columns, narrow, one, out=zeros(2, 8))
    gather_rows(zeros(1, 8), zeros(1, dtype=torch.int64), out=zeros(1, 8))
    present = torch.ones(1, 3, dtype=torch.bool, device=device)
    sinks = zeros(1, 8, dtype=torch.float32)
    slot_attention(zeros(3, 24), sinks, sinks, present, 2, out=zeros(3, 8))
    merge_rows(zeros(1, 3, 8, dtype=torch.float16), torch.tensor([0, 1], dtype=torch.int32, device=device), out=wide)
