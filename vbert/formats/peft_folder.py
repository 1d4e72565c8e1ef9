"""PEFT adapter folders (adapter_config.json + adapter_model.safetensors) into tenants.

Everything the config promises must be in the file, and everything in the file must be used: what is left over, and
every option that changes the function and is not implemented, is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vbert.errors import CorruptFile, RefusedCheckpoint
from vbert.formats.change import LinearChange
from vbert.formats.names import NAMES, locate, module_path, strip_prefix
from vbert.formats.peft_matching import is_saved, targets
from vbert.formats.peft_methods import METHODS, Module
from vbert.formats.task_head import KIND_OF_TASK, POOLER, TASK_OF_KIND, backbone_dense, build_head, head_paths
from vbert.formats.tensors import is_set, read_json, read_tensors, weight_files
from vbert.formats.transformers_folder import Backbone
from vbert.tenant import Delta, Dense, Norm, TenantModule

__all__ = ["CONFIG_FILE", "HONOURED", "read_peft_folder", "refusals"]

CONFIG_FILE = "adapter_config.json"

# Config keys that change nothing at inference, or only where the adapter started from.
_NEUTRAL = {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "peft_type"}
_NEUTRAL |= {"task_type", "fan_in_fan_out", "lora_dropout", "vera_dropout", "megatron_core", "qalora_group_size"}
_NEUTRAL |= {"runtime_config", "eva_config", "ensure_weight_tying", "init_ia3_weights", "init_weights", "d_initial"}
_NEUTRAL |= {"projection_prng_key", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"}
_NEUTRAL |= {"total_step"}
_COMMON = {"target_modules", "exclude_modules", "modules_to_save"}
_LAYERS = {"layers_to_transform", "layers_pattern", "bias", "r"}
_LORA = {"lora_alpha", "rank_pattern", "init_lora_weights"}
HONOURED = {
    "LORA": _COMMON | _LAYERS | _LORA | {"alpha_pattern", "use_rslora", "use_dora", "lora_bias"},
    "IA3": _COMMON | {"feedforward_modules"},
    "ADALORA": _COMMON | _LAYERS | _LORA | {"init_r"},
    "VERA": _COMMON | _LAYERS | {"save_projection"},
}
# Other starting points change the base weights, so that the adapter alone means nothing on the backbone.
_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)

# Keys of one module: what PEFT 0.3 to 0.21 call the same tensor.
_PART = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_[ABE]|lora_magnitude_vector|lora_embedding_[AB]|ia3_l|vera_lambda_[bd])(?:\.weight)?"
)


def read_peft_folder(folder: Path, backbone: Backbone, task: str | None = None) -> TenantModule:
    """Read one adapter. task: a head kind, where the folder leaves it open or a classifier is to rerank.

    Raises: RefusedCheckpoint naming what cannot be honoured, CorruptFile for missing, misshapen or bad tensors.
    """
    config = read_json(folder / CONFIG_FILE)
    for refusal in refusals(config):
        raise refusal
    tensors = read_tensors(weight_files(folder, "adapter_model"))
    model_type = backbone.config.model_type
    prefix = NAMES[model_type].prefix + "."
    modules = _by_module(tensors, model_type)
    peft_task = _task_type(config, modules, model_type, task)
    has_prefix = peft_task in NAMES[model_type].heads or any(f".{prefix}" in key for key in tensors)
    reader = _Reader(backbone, config, modules, prefix if has_prefix else "")
    deltas = tuple(reader.deltas())
    head_config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    head = build_head(backbone, peft_task, task, head_config, reader.dense)
    unused = []
    if POOLER in modules and POOLER not in head_paths(model_type, peft_task):
        del modules[POOLER]
        unused.append(POOLER)  # trained, but no answer of this tenant runs through it
    reader.refuse_leftovers(folder)
    return TenantModule(
        backbone_fingerprint=backbone.fingerprint,
        deltas=deltas,
        head=head,
        source=_source(config) | ({"unused": unused} if unused else {}),
    )


def refusals(config: Mapping[str, Any]) -> Iterator[RefusedCheckpoint]:
    """Every method and option of a config that is not implemented, each with its value and a remedy."""
    method = str(config.get("peft_type"))
    if method not in METHODS:
        yield RefusedCheckpoint(
            f"peft_type {method} is not served; one of {', '.join(METHODS)} is: train the adapter with one of them",
            param="peft_type",
        )
        return
    for key, value in config.items():
        if key not in _NEUTRAL | HONOURED[method] and is_set(value):
            yield RefusedCheckpoint(f"{key} {value!r} in {CONFIG_FILE} is not served; train without it", param=key)
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        yield RefusedCheckpoint(
            f"init_lora_weights {start!r} changes the base weights; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA",
            param="init_lora_weights",
        )
    if config.get("use_dora") and config.get("lora_bias"):
        yield RefusedCheckpoint(
            "lora_bias with use_dora is not served, nor by peft; train without one", param="lora_bias"
        )
    if not config.get("target_modules"):
        yield RefusedCheckpoint(f"target_modules is empty in {CONFIG_FILE}; list the modules", param="target_modules")
    if config.get("task_type") not in (None, *KIND_OF_TASK):
        yield RefusedCheckpoint(
            f"task_type {config['task_type']} is not served; one of {', '.join(KIND_OF_TASK)} is", param="task_type"
        )


def _by_module(tensors: Mapping[str, Tensor], model_type: str) -> dict[str, dict[str, Tensor]]:
    """Module path inside base model or head -> part ("lora_A", "weight", "bias", "lora_B.bias", ...) -> tensor."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key in tensors:
        if _is_copy(key, tensors):
            continue
        name = key.removeprefix("base_model.").removeprefix("model.")
        name = strip_prefix(model_type, name.replace(".modules_to_save.", ".").replace(".base_layer.", "."))
        match = _PART.fullmatch(name)
        path, part = (match["path"], match["part"]) if match else (name.rpartition(".")[0], name.rpartition(".")[2])
        if path.endswith(".lora_B"):
            path, part = path.removesuffix(".lora_B"), f"lora_B.{part}"
        if part in modules.setdefault(path, {}):
            raise CorruptFile(f"{path}.{part} is in the file twice, the second time as {key}; save the adapter again")
        modules[path][part] = tensors[key]
    return modules


def _is_copy(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """bias="all" also writes the biases of modules_to_save under the names of PEFT's wrapper, with the adapter's name
    inside, and those of the untouched module; the trained ones are there under their plain names as well."""
    if ".original_module." in key:
        return True
    before, wrapped, rest = key.partition(".modules_to_save.")
    return bool(wrapped) and any(f"{before}.{end}" in tensors for end in (rest, rest.partition(".")[2]))


class _Reader:
    """Takes tensors out of `modules` as it finds their use; what stays was not understood."""

    def __init__(
        self, backbone: Backbone, config: Mapping[str, Any], modules: dict[str, dict[str, Tensor]], prefix: str
    ) -> None:
        self.backbone, self.config, self.modules, self._prefix = backbone, config, modules, prefix
        self._shared = modules.pop("", {}) if config["peft_type"] == "VERA" else {}

    def deltas(self) -> Iterator[Delta]:
        """Every delta inside the encoder."""
        config = self.backbone.config
        yield from self._norm(-1, "emb_norm")
        for layer in range(config.num_layers):
            for site in NAMES[config.model_type].sites:
                if site.endswith("norm"):
                    yield from self._norm(layer, site)
                    continue
                path = module_path(config.model_type, layer, site)
                weights = self._base(f"layers.{layer}.{site}")
                base = Dense(weight=weights["weight"], bias=weights["bias"])
                change = self._change(path, self._prefix + path, base)
                yield from change.deltas(layer, site) if change else ()

    def dense(self, path: str) -> Dense:
        """A dense layer of the head: trained whole, or as in the backbone's folder with this adapter merged in."""
        parts = self.modules.get(path, {})
        name = self._prefix + path if path == POOLER else path
        if "weight" in parts:
            return Dense(weight=parts.pop("weight"), bias=parts.pop("bias", None))
        if is_saved(self.config, name):
            raise CorruptFile(
                f"modules_to_save promises {path}.weight and the file has none; use the backbone it was trained on, or "
                "save the adapter again"
            )
        base = backbone_dense(self.backbone, path)
        change = self._change(path, name, base)
        return change.fold(base) if change else base

    def refuse_leftovers(self, folder: Path) -> None:
        for path, parts in self.modules.items():
            for part in parts:
                raise RefusedCheckpoint(f"{folder.name} holds {path}.{part}, which is not served: {self._why(path)}")

    def _change(self, path: str, name: str, base: Dense) -> LinearChange | None:
        parts = self.modules.get(path, {})
        bias = base.weight.new_zeros(base.weight.shape[0]) if base.bias is None else base.bias
        module = Module(name=name, weight=base.weight, bias=bias, tensors=parts, shared=self._shared)
        if targets(self.config, name, is_linear=True):
            return METHODS[self.config["peft_type"]](self.config, module)
        if self.config.get("bias") == "all":
            return LinearChange(shift=module.take("bias", tuple(bias.shape)) - bias)
        return None

    def _norm(self, layer: int, site: str) -> Iterator[Norm]:
        path = module_path(self.backbone.config.model_type, layer, site)
        base = self._base("emb_norm" if site == "emb_norm" else f"layers.{layer}.{site}")
        parts = self.modules.get(path, {})
        promised = is_saved(self.config, self._prefix + path)
        names = [
            name for name in ("weight", "bias") if promised or (name == "bias" and self.config.get("bias") == "all")
        ]
        if not names:
            return
        module = Module(name=path, weight=base["weight"], bias=base["bias"], tensors=parts, shared={})
        yield Norm(
            layer=layer, site=site, **(base | {name: module.take(name, tuple(base[name].shape)) for name in names})
        )

    def _base(self, name: str) -> dict[str, Tensor]:
        return {part: self.backbone.weights[f"{name}.{part}"] for part in ("weight", "bias")}

    def _why(self, path: str) -> str:
        place = locate(self.backbone.config.model_type, path)
        if place and place[0] >= self.backbone.config.num_layers:
            return f"the backbone has {self.backbone.config.num_layers} layers; use the one it was trained with"
        if place:
            return f"{CONFIG_FILE} does not ask for it, or it is a whole weight matrix; train it with LoRA"
        if path.startswith("embeddings."):
            return "all tenants share the embeddings; train without them"
        return f"a {self.backbone.config.model_type} encoder with its heads has no such module"


def _task_type(
    config: Mapping[str, Any], modules: Mapping[str, dict[str, Tensor]], model_type: str, kind: str | None
) -> str:
    """PEFT's task type; from the model class or the head's tensors where the config has none."""
    stated = config.get("task_type")
    if stated is not None:
        return str(stated)
    if kind is not None:
        return TASK_OF_KIND[kind]
    base_class = str((config.get("auto_mapping") or {}).get("base_model_class", ""))
    for suffix, task in (("ForSequenceClassification", "SEQ_CLS"), ("ForTokenClassification", "TOKEN_CLS")):
        if base_class.endswith(suffix):
            return task
    heads = {task: set(head_paths(model_type, task)) - {POOLER} for task in ("SEQ_CLS", "TOKEN_CLS")}
    found = [task for task, paths in heads.items() if paths & modules.keys()]
    if not found or base_class.endswith("Model"):
        return "FEATURE_EXTRACTION"
    if len(found) > 1 and heads["SEQ_CLS"] <= modules.keys() and len(heads["SEQ_CLS"]) > 1:
        found = ["SEQ_CLS"]
    if len(found) > 1:
        raise RefusedCheckpoint(
            f"task_type is null in {CONFIG_FILE} and the head fits {' and '.join(found)}; write one of them there",
            param="task_type",
        )
    return found[0]


def _source(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("peft_version", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "use_dora", "bias")
    source = {"format": "peft", "method": config["peft_type"]}
    return source | {key: config[key] for key in kept if config.get(key) not in (None, False, "none")}
