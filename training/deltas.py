"""What may be trained inside a frozen backbone: one small autograd module per delta, and the tenant delta it becomes.

A module returns what is added: to a linear's output, to a bottleneck's out-tap, or to a LayerNorm's bias. All start
at zero effect, so a fresh tenant is the backbone and an untrained head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from vbert.activations import activate
from vbert.config import EncoderConfig
from vbert.tenant import Affine, Bottleneck, Delta, LowRank, Norm

__all__ = ["BottleneckDelta", "LowRankDelta", "NormBiasDelta", "ShiftDelta", "TrainableDelta", "to_host"]


def to_host(tensor: Tensor) -> Tensor:
    """A contiguous fp32 copy on the host that no later step changes."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


class TrainableDelta(nn.Module, ABC):
    """At `site` of `layer`, named as in vbert.tenant."""

    def __init__(self, layer: int, site: str) -> None:
        super().__init__()
        self.layer, self.site = layer, site

    @abstractmethod
    def forward(self, rows: Tensor) -> Tensor:
        """What is added, from the rows that enter: [..., H_in] to [..., H_out] or [H_out]."""

    @abstractmethod
    def export(self) -> Delta:
        """The trained values as fp32 host tensors."""


class LowRankDelta(TrainableDelta):
    """LoRA: (x A) B alpha / R, with A random and B zero. Source: Hu et al. 2021, arXiv:2106.09685."""

    def __init__(
        self, config: EncoderConfig, layer: int, site: str, *, rank: int, alpha: float, dropout: float
    ) -> None:
        super().__init__(layer, site)
        self.scale, self.dropout = alpha / rank, dropout
        bound = 1 / math.sqrt(config.site_in(site))
        self.a = nn.Parameter(torch.empty(config.site_in(site), rank).uniform_(-bound, bound))  # [H_in, R]
        self.b = nn.Parameter(torch.zeros(rank, config.site_out(site)))  # [R, H_out]

    def forward(self, rows: Tensor) -> Tensor:
        rows = nn.functional.dropout(rows, self.dropout, self.training)
        return rows @ self.a @ (self.b * self.scale)

    def export(self) -> LowRank:
        return LowRank(layer=self.layer, site=self.site, a=to_host(self.a), b=to_host(self.b * self.scale))


class BottleneckDelta(TrainableDelta):
    """act(in D + d) U + e, with D random and the rest zero.

    Sources: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247; He et al. 2021,
    arXiv:2110.04366 (parallel).
    """

    def __init__(self, config: EncoderConfig, layer: int, site: str, *, size: int, activation: str) -> None:
        super().__init__(layer, site)
        self.in_tap, self.activation = site.split(".")[1].split(">")[0], activation
        self.down = nn.Parameter(torch.empty(config.hidden_size, size).normal_(std=0.02))  # [H, R]
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up = nn.Parameter(torch.zeros(size, config.hidden_size))  # [R, H]
        self.up_bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, rows: Tensor) -> Tensor:
        return activate(rows @ self.down + self.down_bias, self.activation) @ self.up + self.up_bias

    def export(self) -> Bottleneck:
        parts = {name: to_host(parameter) for name, parameter in self.named_parameters()}
        return Bottleneck(layer=self.layer, site=self.site, activation=self.activation, **parts)


class ShiftDelta(TrainableDelta):
    """BitFit at a linear: a trained bias beside the shared one. Source: Ben Zaken et al. 2021, arXiv:2106.10199."""

    def __init__(self, config: EncoderConfig, layer: int, site: str) -> None:
        super().__init__(layer, site)
        self.shift = nn.Parameter(torch.zeros(config.site_out(site)))

    def forward(self, rows: Tensor) -> Tensor:
        return self.shift

    def export(self) -> Affine:
        return Affine(layer=self.layer, site=self.site, shift=to_host(self.shift))


class NormBiasDelta(TrainableDelta):
    """BitFit at a LayerNorm: its bias is tuned, its weight stays. shared: weight and bias of the backbone, [H] each."""

    def __init__(self, layer: int, site: str, shared: tuple[Tensor, Tensor]) -> None:
        super().__init__(layer, site)
        self.shared = shared
        self.shift = nn.Parameter(torch.zeros_like(shared[1]))

    def forward(self, rows: Tensor) -> Tensor:
        return self.shift

    def export(self) -> Norm:
        weight, bias = (to_host(tensor) for tensor in self.shared)
        return Norm(layer=self.layer, site=self.site, weight=weight, bias=bias + to_host(self.shift))
