"""AdapterHub folders, as `adapters` saves them (adapter_config.json + adapter.safetensors, a head beside it).

Bottlenecks: where the library reads and writes follows from original_ln_before, original_ln_after, residual_before_ln
and is_parallel (adapters/methods/modeling.py, 1.3); the placements that are not one of our taps are refused. Its LoRA
and IA3 are read too. Gates, PHM, invertible adapters, fusion, prefixes are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vbert.config import ACTIVATIONS
from vbert.errors import CorruptFile, RefusedCheckpoint
from vbert.formats.adapterhub_head import SAVE, read_head
from vbert.formats.change import LinearChange
from vbert.formats.names import NAMES, module_path, strip_prefix
from vbert.formats.tensors import is_set, read_json, read_tensors, weight_files
from vbert.formats.transformers_folder import Backbone
from vbert.tenant import Bottleneck, Delta, TenantModule

__all__ = ["HONOURED", "INTERFACE_FILE", "method", "read_adapterhub_folder", "refusals"]

CONFIG_FILE = "adapter_config.json"
INTERFACE_FILE = "adapter_interface.json"

# (original_ln_before, residual_before_ln, original_ln_after) -> taps. Others add the residual twice or leave the
# LayerNorm out.
_TAPS = {
    (False, True, True): "output>output",
    (False, False, True): "output>output",
    (True, True, True): "normed>output",
    (True, False, False): "after>after",
}
HONOURED = {"mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "is_parallel", "scaling", "leave_out"}
HONOURED |= {"original_ln_before", "original_ln_after", "residual_before_ln", "architecture", "composition_mode"}
HONOURED |= {"selfattn_lora", "intermediate_lora", "output_lora", "r", "alpha", "attn_matrices"}
_NEUTRAL = {"init_weights", "init_weights_seed", "dropout", "stochastic_depth", "cross_adapter", "dtype"}
_NEUTRAL |= {"adapter_residual_before_ln", "inv_adapter_reduction_factor", "phm_dim", "factorized_phm_W", "phm_rank"}
_NEUTRAL |= {"shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init", "phm_init_range", "learn_phm"}
_NEUTRAL |= {"hypercomplex_nonlinearity", "phm_bias"}

_Modules = dict[str, dict[str, Tensor]]


def read_adapterhub_folder(folder: Path, backbone: Backbone, task: str | None = None) -> TenantModule:
    """Read one adapter with its head; without a head it embeds. task: a head kind, as for the other readers.

    Raises: RefusedCheckpoint naming what cannot be honoured, CorruptFile for missing, misshapen or bad tensors.
    """
    stated = read_json(folder / CONFIG_FILE)
    hooked = (folder / INTERFACE_FILE).is_file()
    for refusal in refusals(stated, hooked=hooked):
        raise refusal
    config, model_type = stated["config"], backbone.config.model_type
    if (stated.get("model_type"), stated.get("hidden_size")) != (model_type, backbone.config.hidden_size):
        raise RefusedCheckpoint(
            f"the adapter was made for {stated.get('model_type')} of width {stated.get('hidden_size')}, the backbone "
            f"is {model_type} of width {backbone.config.hidden_size}; use the backbone it was trained on",
            param="model_type",
        )
    modules = _by_module(read_tensors(weight_files(folder, "adapter", SAVE)), stated["name"], model_type)
    if config.get("architecture") == "lora":
        deltas = tuple(_low_rank(stated, modules, backbone))
    else:
        deltas = tuple(_bottlenecks(stated, modules, backbone, hooked))
    for path, parts in modules.items():
        for part in parts:
            raise RefusedCheckpoint(
                f"{folder.name} holds {path}.{part}, which its adapter_config.json does not ask for"
            )
    return TenantModule(
        backbone_fingerprint=backbone.fingerprint,
        deltas=deltas,
        head=read_head(folder, backbone, task),
        source={"format": "adapters", "method": method(config), "version": str(stated.get("version"))},
    )


def refusals(stated: Mapping[str, Any], *, hooked: bool) -> Iterator[RefusedCheckpoint]:
    """Everything in adapter_config.json that is not implemented, each with its value and a remedy. hooked: made
    through an AdapterModelInterface, for models the library does not know."""
    config = stated.get("config")
    if not isinstance(config, dict):
        yield RefusedCheckpoint(f"config {config!r} in {CONFIG_FILE} is not served; save it with adapters 1.x")
        return
    if config.get("architecture") not in (None, "lora"):
        yield RefusedCheckpoint(
            f"architecture {config['architecture']!r} is not served; bottleneck and lora are", param="architecture"
        )
        return
    for key, value in config.items():
        if key not in HONOURED | _NEUTRAL and is_set(value):
            yield RefusedCheckpoint(f"{key} {value!r} in {CONFIG_FILE} is not served; train without it", param=key)
    if config.get("architecture") is None:
        try:
            _tap(config, hooked)
            _activation(stated)
        except RefusedCheckpoint as refusal:
            yield refusal


def _tap(config: Mapping[str, Any], hooked: bool) -> str:
    """Our taps of the library's placement."""
    before, after = bool(config.get("original_ln_before")), bool(config.get("original_ln_after", True))
    residual = config.get("residual_before_ln", True)
    if config.get("is_parallel"):
        tap = "input>output" if after else None
    elif hooked and before:
        raise RefusedCheckpoint(
            "original_ln_before true through an AdapterModelInterface is not served: adapters 1.3 then uses the last "
            "layer's LayerNorm in every layer; train with double_seq_bn or par_bn",
            param="original_ln_before",
        )
    else:
        tap = _TAPS.get((before, residual, after))
    if tap is None:
        raise RefusedCheckpoint(
            f"original_ln_before {before}, residual_before_ln {residual!r}, original_ln_after {after} is not served; "
            "train with seq_bn, double_seq_bn or par_bn",
            param="original_ln_after",
        )
    return tap


def _activation(stated: Mapping[str, Any]) -> str:
    name = str(stated["config"].get("non_linearity")).lower()
    if "version" not in stated:  # adapters before 1.0 meant the tanh form by gelu
        name = {"gelu": "gelu_new", "gelu_orig": "gelu"}.get(name, name)
    name = {"swish": "silu", "linear": "identity"}.get(name, name)
    if name not in ACTIVATIONS:
        raise RefusedCheckpoint(
            f"non_linearity {name!r} is not served; one of {', '.join(ACTIVATIONS)} is", param="non_linearity"
        )
    return name


def _by_module(tensors: Mapping[str, Tensor], name: str, model_type: str) -> _Modules:
    """Path of the module that holds the adapter -> name inside the adapter -> tensor."""
    modules: _Modules = {}
    for key, tensor in tensors.items():
        path, _, part = re.sub(rf"\.(adapters|loras)\.{re.escape(name)}\.", "|", key, count=1).partition("|")
        modules.setdefault(strip_prefix(model_type, path), {})[part] = tensor
    return modules


def _take(modules: _Modules, path: str, part: str, shape: tuple[int, ...]) -> Tensor:
    parts = modules.get(path, {})
    if part not in parts:
        raise CorruptFile(f"adapter_config.json promises {part} of {path} and the file has none; save it again")
    if tuple(parts[part].shape) != shape:
        raise CorruptFile(f"{part} of {path} has shape {tuple(parts[part].shape)}, config and backbone ask for {shape}")
    return parts.pop(part)


def _bottlenecks(
    stated: Mapping[str, Any], modules: _Modules, backbone: Backbone, hooked: bool
) -> Iterator[Bottleneck]:
    config, activation = stated["config"], _activation(stated)
    names = {"attn": "attention.output", "ffn": "output"}
    if hooked or backbone.config.model_type == "distilbert":
        names = {"attn": "attention_adapters", "ffn": "output_adapters"}
    wanted = [sub for sub, key in (("attn", "mh_adapter"), ("ffn", "output_adapter")) if config.get(key)]
    hidden, layers = backbone.config.hidden_size, NAMES[backbone.config.model_type].layers
    for layer in _layers(config, backbone):
        rank = _rank(config, layer, hidden)
        for sub in wanted:
            path = f"{layers}.{layer}.{names[sub]}"
            scale: float | Tensor = config.get("scaling", 1.0)
            if isinstance(scale, str):
                scale = _take(modules, path, "scaling", (1,) if scale == "learned" else (hidden,))
            yield Bottleneck(
                layer=layer,
                site=f"{sub}.{_tap(config, hooked)}",
                activation=activation,
                down=_take(modules, path, "adapter_down.0.weight", (rank, hidden)).T.contiguous(),
                down_bias=_take(modules, path, "adapter_down.0.bias", (rank,)),
                up=(_take(modules, path, "adapter_up.weight", (hidden, rank)).T * scale).contiguous(),
                up_bias=_take(modules, path, "adapter_up.bias", (hidden,)) * scale,
            )


def _rank(config: Mapping[str, Any], layer: int, hidden: int) -> int:
    factor = config.get("reduction_factor")
    if isinstance(factor, dict):
        factor = factor.get(str(layer), factor.get("default"))
    if not isinstance(factor, int | float) or factor <= 0:
        raise RefusedCheckpoint(f"reduction_factor {factor!r} of layer {layer} is not a number above 0; correct it")
    return max(1, int(hidden // factor))


def _layers(config: Mapping[str, Any], backbone: Backbone) -> list[int]:
    left_out = config.get("leave_out") or []
    return [layer for layer in range(backbone.config.num_layers) if layer not in left_out]


def _low_rank(stated: Mapping[str, Any], modules: _Modules, backbone: Backbone) -> Iterator[Delta]:
    """The library's LoRA, and its IA3: the same config with composition_mode "scale" and only lora_B."""
    config, shape = stated["config"], backbone.config
    sites = list(config.get("attn_matrices", ())) if config.get("selfattn_lora") else []
    sites += ["ffn_up"] if config.get("intermediate_lora") else []
    sites += ["ffn_down"] if config.get("output_lora") else []
    rank, alpha = config["r"], _alpha(stated)
    for layer in _layers(config, backbone):
        for site in sites:
            path = module_path(shape.model_type, layer, site)
            b = _take(modules, path, "lora_B", (shape.site_out(site), rank))
            if config.get("composition_mode") == "scale":
                change = LinearChange(scale=b.reshape(-1) * alpha)
            else:
                a = _take(modules, path, "lora_A", (rank, shape.site_in(site)))
                change = LinearChange(a=a.T, b=b.T * (alpha / rank))
            yield from change.deltas(layer, site)


def _alpha(stated: Mapping[str, Any]) -> float:
    """Before 1.1 the library scaled by alpha / alpha; it loads such adapters with alpha = r."""
    config = stated["config"]
    version = re.match(r"adapters\.(\d+)\.(\d+)", str(stated.get("version", "")))
    old = version is not None and (int(version[1]), int(version[2])) < (1, 1)
    return float(config["r"] if old else config["alpha"])


def method(config: Mapping[str, Any]) -> str:
    if config.get("architecture") == "lora":
        return "ia3" if config.get("composition_mode") == "scale" else "lora"
    if config.get("is_parallel"):
        return "parallel"
    return "houlsby" if config.get("mh_adapter") else "pfeiffer"
