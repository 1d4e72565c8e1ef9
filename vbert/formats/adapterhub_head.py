"""Heads that `adapters` saves beside an adapter: its own flexible heads, and those of `transformers` classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vbert.config import ACTIVATIONS
from vbert.errors import CorruptFile, RefusedCheckpoint
from vbert.formats.task_head import backbone_dense, build_head, checked_kind, labelled
from vbert.formats.tensors import read_json, read_tensors, weight_files
from vbert.formats.transformers_folder import Backbone
from vbert.tenant import Dense, Head

__all__ = ["HEAD_FILE", "SAVE", "check_head_config", "read_head"]

HEAD_FILE = "head_config.json"
SAVE = "save_adapter(..., use_safetensors=True)"

# head_type -> task type, pooling, problem type.
_FLEX = {
    "classification": ("SEQ_CLS", "cls", None),
    "multilabel_classification": ("SEQ_CLS", "cls", "multi_label_classification"),
    "tagging": ("TOKEN_CLS", "none", None),
}
_STATIC = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


def read_head(folder: Path, backbone: Backbone, kind: str | None) -> Head:
    """The head in the folder; the backbone's embed head where there is none. kind: asked by the caller, or None.

    Raises: RefusedCheckpoint for head types, activations or tensors that are not served; CorruptFile.
    """
    if not (folder / HEAD_FILE).is_file():
        checked_kind("FEATURE_EXTRACTION", kind)
        return backbone.embed_head
    stated = read_json(folder / HEAD_FILE)
    check_head_config(stated)
    tensors = read_tensors(weight_files(folder, "model_head", SAVE))
    head = (
        _flex_head(stated, tensors, backbone, kind)
        if stated.get("config")
        else _static(stated, tensors, backbone, kind)
    )
    for key in tensors:
        raise RefusedCheckpoint(f"{folder.name} holds {key}, which its {HEAD_FILE} does not ask for")
    return head


def check_head_config(stated: Mapping[str, Any]) -> None:
    """Raise RefusedCheckpoint for a head that is not served, naming it."""
    config = stated.get("config")
    if not config:
        _static_task(stated)
        return
    if config.get("head_type") not in _FLEX:
        raise RefusedCheckpoint(
            f"head_type {config.get('head_type')!r} is not served; one of {', '.join(_FLEX)} is", param="head_type"
        )
    _activation(config)


def _static_task(stated: Mapping[str, Any]) -> str:
    model_class = str(stated.get("model_class"))
    task = next((task for suffix, task in _STATIC.items() if model_class.endswith(suffix)), None)
    if task is None:
        raise RefusedCheckpoint(f"the head of {model_class} is not served; a classifier's is", param="model_class")
    return task


def _static(stated: Mapping[str, Any], tensors: dict[str, Tensor], backbone: Backbone, kind: str | None) -> Head:
    def dense(path: str) -> Dense:
        if f"{path}.weight" not in tensors:
            return backbone_dense(backbone, path)
        return Dense(weight=tensors.pop(f"{path}.weight"), bias=tensors.pop(f"{path}.bias", None))

    return build_head(backbone, _static_task(stated), kind, {"id2label": _id2label(stated)}, dense)


def _flex_head(stated: Mapping[str, Any], tensors: dict[str, Tensor], backbone: Backbone, kind: str | None) -> Head:
    """Dropout, linear, activation, dropout, linear, ...: modules of an nn.Sequential, counted with the weightless."""
    config = stated["config"]
    task, pooling, problem = _FLEX[config["head_type"]]
    if config.get("use_pooler") and not backbone.config.has_pooler:
        raise RefusedCheckpoint("use_pooler: the backbone's folder has no pooler; use the backbone it was trained on")
    activation, layers, position = _activation(config), [], 0
    for i in range(config["layers"]):
        last = i == config["layers"] - 1
        key = f"heads.{stated['name']}.{position + 1}"
        if f"{key}.weight" not in tensors:
            raise CorruptFile(f"{HEAD_FILE} promises {key}.weight and the file has none; save the head again")
        layers.append(
            Dense(
                weight=tensors.pop(f"{key}.weight"),
                bias=tensors.pop(f"{key}.bias", None),
                activation="identity" if last else activation,
            )
        )
        position += 3 if config.get("activation_function") else 2
    width = backbone.config.hidden_size
    head = Head(kind="classify", pooling=pooling, shared_pooler=bool(config.get("use_pooler")), layers=tuple(layers))
    return labelled(head, task, kind, {"id2label": _id2label(config), "problem_type": problem}, width)


def _activation(config: Mapping[str, Any]) -> str:
    name = str(config.get("activation_function") or "identity").lower()
    name = {"swish": "silu", "linear": "identity"}.get(name, name)
    if name not in ACTIVATIONS:
        raise RefusedCheckpoint(
            f"activation_function {name!r} of the head is not served; one of {', '.join(ACTIVATIONS)} is",
            param="activation_function",
        )
    return name


def _id2label(config: Mapping[str, Any]) -> dict[int, str]:
    return {int(i): str(label) for label, i in (config.get("label2id") or {}).items()}
