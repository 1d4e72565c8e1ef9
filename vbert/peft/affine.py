"""Affine deltas in a batch: BitFit's biases, IA3's scales, DoRA's magnitude, and replaced LayerNorms.

Sources: Ben Zaken et al. 2021, arXiv:2106.10199; Liu et al. 2022, arXiv:2205.05638; Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from vbert.kernels.segmented_affine import segmented_affine
from vbert.kernels.segmented_layer_norm import segmented_layer_norm
from vbert.peft.use import ClassUse

__all__ = ["changes_output", "replace_norm", "scale_and_shift", "scale_input", "scales_input"]


def scales_input(uses: Sequence[ClassUse], layer: int, site: str) -> bool:
    """Whether a tenant has an input scale there."""
    return any("input_scale" in found[1] for use in uses if (found := use.at(layer, site)))


def scale_input(uses: Sequence[ClassUse], layer: int, site: str, x: Tensor) -> None:
    """x times each tenant's input scale, in place, for the tenants that have one."""
    for use in uses:
        found = use.at(layer, site)
        if found and "input_scale" in found[1]:
            segmented_affine(x, found[1]["input_scale"], None, use.segments, out=x)


def changes_output(uses: Sequence[ClassUse], layer: int, sites: Iterable[str]) -> bool:
    """Whether a tenant has a scale or a shift at one of the sites."""
    return any({"scale", "shift"} & found[1].keys() for use in uses for s in sites if (found := use.at(layer, s)))


def scale_and_shift(uses: Sequence[ClassUse], layer: int, outs: Mapping[str, Tensor]) -> None:
    """y = y * scale + shift at every site in `outs`, in place, y with the shared bias in it."""
    for use in uses:
        for site, out in outs.items():
            found = use.at(layer, site)
            if found and ("scale" in found[1] or "shift" in found[1]):
                segmented_affine(out, found[1].get("scale"), found[1].get("shift"), use.segments, out=out)


def replace_norm(uses: Sequence[ClassUse], layer: int, site: str, rows: Tensor, out: Tensor, eps: float) -> None:
    """Overwrite `out` with LayerNorm(rows) under each tenant's own weight and bias."""
    for use in uses:
        if found := use.at(layer, site):
            segmented_layer_norm(rows, found[1]["weight"], found[1]["bias"], use.segments, eps=eps, out=out)
