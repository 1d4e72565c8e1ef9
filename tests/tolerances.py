"""How near is the same, for every dtype, in one place.

fp32 is the promise of the project: 1e-4 on hidden states and on answers. bfloat16 keeps 8 bits of a number, so a
hidden state is compared by its direction and an answer relative to its largest number, as self-tests are at load.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vbert.selftest import TOLERANCES as ANSWER

__all__ = ["ANSWER", "HIDDEN_COSINE", "HIDDEN_FP32", "OPERATOR", "assert_answer", "assert_hidden"]

HIDDEN_FP32 = 1e-4  # max abs difference of last hidden states to transformers
HIDDEN_COSINE = {torch.float32: 1 - 1e-6, torch.float16: 0.9999, torch.bfloat16: 0.999}  # per token

# One operator against its fp32 reference, relative to the largest number of the result.
OPERATOR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_answer(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """A head's output against the one of an independent implementation."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    limit = ANSWER[dtype].absolute + ANSWER[dtype].relative * float(expected.abs().max())
    worst = float((actual.float() - expected.float()).abs().max())
    assert worst <= limit, f"off by {worst:.3g}, the limit of {dtype} is {limit:.3g}"


def assert_hidden(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """[n, H] hidden states of one sequence against fp32 ones."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    if dtype is torch.float32:
        worst = float((actual - expected).abs().max())
        assert worst < HIDDEN_FP32, f"off by {worst:.3g}, the limit is {HIDDEN_FP32}"
    cosine = float(torch.cosine_similarity(actual.double(), expected.double(), dim=-1).min())
    assert cosine > HIDDEN_COSINE[dtype], f"cosine {cosine:.6f}, the limit of {dtype} is {HIDDEN_COSINE[dtype]}"
