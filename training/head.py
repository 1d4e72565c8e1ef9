"""`TrainableHead`: pooling, an optional hidden layer and one linear layer, and the tenant head it becomes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.deltas import to_host
from vbert.tenant import Dense, Head

__all__ = ["TrainableHead", "pooled"]


def pooled(pooling: str, hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, n, H] to [B, H], or as it is where nothing is pooled. mask: [B, n]."""
    if pooling == "none":
        return hidden
    if pooling == "cls":
        return hidden[:, 0]
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


class TrainableHead(nn.Module):
    """kind, pooling, problem, labels: as in vbert.tenant.Head. hidden_size of the backbone is H.

    inner_size: width of a tanh layer before the last one; 0: none. A regression head trains on standardised targets:
    `mean` and `std` of the targets are folded into the last layer, in the forward as in the export.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        kind: str,
        pooling: str,
        problem: str,
        labels: tuple[str, ...],
        inner_size: int = 0,
        dropout: float = 0.0,
        target_mean: float = 0.0,
        target_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.kind, self.pooling, self.problem, self.labels = kind, pooling, problem, labels
        self.target_mean, self.target_std, self.dropout = target_mean, target_std, dropout
        self.inner = nn.Linear(hidden_size, inner_size) if inner_size else None
        self.last = nn.Linear(inner_size or hidden_size, len(labels) if problem == "single_label" else 1)

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[B, n, H] to [B, H], or as it is for a token head."""
        return pooled(self.pooling, hidden, mask)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        rows = nn.functional.dropout(self.pool(hidden, mask), self.dropout, self.training)
        if self.inner is not None:
            rows = nn.functional.dropout(torch.tanh(self.inner(rows)), self.dropout, self.training)
        weight, bias = self._last()
        return nn.functional.linear(rows, weight, bias)

    def _last(self) -> tuple[Tensor, Tensor]:
        return self.last.weight * self.target_std, self.last.bias * self.target_std + self.target_mean

    def export(self) -> Head:
        weight, bias = self._last()
        layers = [Dense(weight=to_host(weight), bias=to_host(bias))]
        if self.inner is not None:
            layers.insert(0, Dense(weight=to_host(self.inner.weight), bias=to_host(self.inner.bias), activation="tanh"))
        return Head(
            kind=self.kind, pooling=self.pooling, layers=tuple(layers), problem=self.problem, labels=self.labels
        )
