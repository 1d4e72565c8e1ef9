"""What one checkpoint module does to one linear: `LinearChange`, as deltas inside a layer or folded into a head.

Every PEFT method of a linear becomes one of these first, so that the same method at a head's dense layer, where there
is no delta, is merged by the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vbert.errors import RefusedCheckpoint
from vbert.tenant import Affine, Delta, Dense, LowRank

__all__ = ["LinearChange"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearChange:
    """y = ((x * input_scale) W^T + bias + (x * input_scale) a b) * scale + shift, bias being the shared one."""

    a: Tensor | None = None  # [H_in, R]
    b: Tensor | None = None  # [R, H_out]
    input_scale: Tensor | None = None  # [H_in]
    scale: Tensor | None = None  # [H_out]
    shift: Tensor | None = None  # [H_out]

    def deltas(self, layer: int, site: str) -> list[Delta]:
        """The same as deltas at a site of a layer; what changes nothing is left out.

        Raises: RefusedCheckpoint for an input scale where q, k and v share their input.
        """
        found: list[Delta] = []
        if self.a is not None and self.b is not None and self.a.shape[1]:
            found.append(LowRank(layer=layer, site=site, a=self.a.contiguous(), b=self.b.contiguous()))
        if self.input_scale is not None and site in ("q", "k", "v"):
            raise RefusedCheckpoint(
                f"layer {layer} scales the input of {site}, which q, k and v share; train with only feed-forward "
                "modules in feedforward_modules",
                param="feedforward_modules",
            )
        shift = self.shift if self.shift is not None and bool(self.shift.any()) else None
        if any(part is not None for part in (self.input_scale, self.scale, shift)):
            found.append(Affine(layer=layer, site=site, input_scale=self.input_scale, scale=self.scale, shift=shift))
        return found

    def fold(self, dense: Dense) -> Dense:
        """The same merged into a dense layer [out, in]."""
        weight = dense.weight
        bias = torch.zeros(weight.shape[0]) if dense.bias is None else dense.bias
        if self.a is not None and self.b is not None:
            weight = weight + (self.a @ self.b).T
        if self.input_scale is not None:
            weight = weight * self.input_scale
        if self.scale is not None:
            weight, bias = weight * self.scale[:, None], bias * self.scale
        if self.shift is not None:
            bias = bias + self.shift
        return Dense(weight=weight, bias=bias, activation=dense.activation)
