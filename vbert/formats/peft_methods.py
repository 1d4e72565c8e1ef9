"""PEFT methods as changes of one linear: LoRA (rsLoRA, lora_bias), DoRA, IA3, AdaLoRA, VeRA.

Each function takes the tensors that the file holds for one module, takes out what it uses, and gives a
`LinearChange`. Names and scales are those of PEFT 0.21; the numbers are proven against it in tests/formats/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbert.errors import CorruptFile, RefusedCheckpoint
from vbert.formats.change import LinearChange
from vbert.formats.peft_matching import is_feedforward, pattern_value

__all__ = ["METHODS", "Module"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One linear: its name in the trained model, shared weight [out, in] and bias, its own tensors in the file."""

    name: str
    weight: Tensor
    bias: Tensor
    tensors: dict[str, Tensor]
    shared: dict[str, Tensor]  # of the whole checkpoint (VeRA's projections)

    def take(self, part: str, shape: tuple[int, ...]) -> Tensor:
        """Remove one tensor. Raises: CorruptFile when it is missing or has another shape."""
        tensor = self.tensors.pop(part, None)
        if tensor is None:
            raise CorruptFile(
                f"the config promises {part} of {self.name} and the file has none; save the adapter again"
            )
        if tuple(tensor.shape) != shape:
            raise CorruptFile(
                f"{part} of {self.name} has shape {tuple(tensor.shape)}, config and backbone ask for {shape}; "
                "use the backbone and config it was trained with"
            )
        return tensor


Config = Mapping[str, Any]


def _lora(config: Config, module: Module) -> LinearChange:
    """y += s B A x, s = alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    rank = pattern_value(config.get("rank_pattern"), module.name, config.get("r", 8))
    alpha = pattern_value(config.get("alpha_pattern"), module.name, config.get("lora_alpha", 8))
    if not isinstance(rank, int) or rank < 1:
        raise RefusedCheckpoint(f"r is {rank!r} for {module.name}; a whole number above 0 belongs there", param="r")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    out_size, in_size = module.weight.shape
    a = module.take("lora_A", (rank, in_size)).T
    b = module.take("lora_B", (out_size, rank)).T * scaling
    shift = _bias_shift(config, module)
    if config.get("lora_bias"):
        shift = _plus(shift, module.take("lora_B.bias", (out_size,)) * scaling)
    if not config.get("use_dora"):
        return LinearChange(a=a, b=b, shift=shift)
    # DoRA (Liu et al. 2024, arXiv:2402.09353): y = g (W + s B A) x + bias, g = m / |W + s B A| row by row, so the
    # shared bias inside our scale has to be given back.
    norm = torch.linalg.norm(module.weight + (a @ b).T, dim=1)
    scale = module.take("lora_magnitude_vector", (out_size,)) / norm
    return LinearChange(a=a, b=b, scale=scale, shift=_plus(shift, module.bias * (1 - scale)))


def _ia3(config: Config, module: Module) -> LinearChange:
    """Output times l, or input times l in the feed-forward modules (Liu et al. 2022, arXiv:2205.05638)."""
    out_size, in_size = module.weight.shape
    if is_feedforward(config, module.name):
        return LinearChange(input_scale=module.take("ia3_l", (1, in_size)).reshape(-1))
    return LinearChange(scale=module.take("ia3_l", (out_size, 1)).reshape(-1))


def _adalora(config: Config, module: Module) -> LinearChange:
    """y += s B (E * A) x, s = alpha / init_r: pruned ranks are gone from the file, the divisor stays
    (Zhang et al. 2023, arXiv:2303.10512)."""
    init_rank = config.get("init_r", 12)
    alpha = config.get("lora_alpha", 8)
    scaling = (alpha if alpha > 0 else float(init_rank)) / (init_rank + 1e-5)
    out_size, in_size = module.weight.shape
    rank = module.tensors["lora_E"].shape[0] if "lora_E" in module.tensors else init_rank
    a = (module.take("lora_A", (rank, in_size)) * module.take("lora_E", (rank, 1))).T
    return LinearChange(a=a, b=module.take("lora_B", (out_size, rank)).T * scaling, shift=_bias_shift(config, module))


def _vera(config: Config, module: Module) -> LinearChange:
    """y += diag(b) B diag(d) A x with A and B shared by all modules (Kopiczko et al. 2024, arXiv:2310.11454)."""
    rank = config.get("r", 256)
    out_size, in_size = module.weight.shape
    if not {"vera_A", "vera_B"} <= module.shared.keys():
        raise RefusedCheckpoint(
            "save_projection is false in adapter_config.json and VeRA's projections are not in the file; save it with "
            "save_projection=True",
            param="save_projection",
        )
    d = module.take("vera_lambda_d", (rank,))
    b = module.take("vera_lambda_b", (out_size,))
    projection_in, projection_out = module.shared["vera_A"][:, :in_size], module.shared["vera_B"][:out_size]
    return LinearChange(a=projection_in.T * d, b=projection_out.T * b, shift=_bias_shift(config, module))


def _bias_shift(config: Config, module: Module) -> Tensor | None:
    """The trained bias of a targeted module (bias is "all" or "lora_only"), as what it adds to the shared one."""
    if config.get("bias", "none") == "none":
        return None
    return module.take("bias", tuple(module.bias.shape)) - module.bias


def _plus(left: Tensor | None, right: Tensor) -> Tensor:
    return right if left is None else left + right


METHODS: dict[str, Callable[[Config, Module], LinearChange]] = {
    "LORA": _lora,
    "IA3": _ia3,
    "ADALORA": _adalora,
    "VERA": _vera,
}
