"""What enters each linear of a whole model, over texts: which changes of its weights matter there, and which do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vbert.formats.original import watch_linears
from vbert.formats.transformers_folder import Backbone
from vbert.tokenizer import Encoded

__all__ = ["InputMoments", "input_moments"]

_DAMPING = 0.01  # of the mean variance, in every direction: texts to come differ from those seen


class InputMoments:
    """Mean and covariance of rows [n, H_in] that come bit by bit."""

    def __init__(self, width: int) -> None:
        self._count, self._sum, self._products = 0, torch.zeros(width), torch.zeros(width, width)

    def add(self, rows: Tensor) -> None:
        self._count += len(rows)
        self._sum += rows.sum(0)
        self._products.addmm_(rows.T, rows)

    @property
    def mean(self) -> Tensor:
        """[H_in]."""
        return self._sum / self._count

    def factor(self) -> Tensor:
        """[H_in, H_in] lower triangular L, for which L L^T is the covariance, damped: what a change D of the weights
        does to the rows that leave varies by the norm of D L."""
        covariance = self._products / self._count - torch.outer(self.mean, self.mean)
        damping = _DAMPING * covariance.diagonal().mean()
        factor: Tensor = torch.linalg.cholesky(covariance + damping * torch.eye(len(covariance)))
        return factor


def input_moments(model: Backbone, inputs: Sequence[Encoded]) -> Mapping[tuple[int, str], InputMoments]:
    """By layer and site; nothing without inputs. model: a whole one, which `transformers` computes."""
    found: dict[tuple[int, str], InputMoments] = {}

    def see(layer: int, site: str, rows: Tensor) -> None:
        found.setdefault((layer, site), InputMoments(rows.shape[1])).add(rows)

    if inputs:
        watch_linears(model, inputs, see)
    return found
