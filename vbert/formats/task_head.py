"""Task heads as `transformers` models have them, read into `Head`: layers, pooler, problem type, label names.

A reader gives `dense`, which finds (or merges) the dense layer at a module path; this module knows which paths a head
has, whether the backbone's own pooler can be shared, and what the config says of labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from vbert.errors import CorruptFile, RefusedCheckpoint
from vbert.formats.names import NAMES
from vbert.formats.tensors import read_tensors, weight_files
from vbert.formats.transformers_folder import Backbone
from vbert.tenant import Dense, Head

__all__ = [
    "KIND_OF_TASK",
    "POOLER",
    "TASK_OF_KIND",
    "backbone_dense",
    "build_head",
    "checked_kind",
    "head_paths",
    "labelled",
]

POOLER = "pooler.dense"
KIND_OF_TASK = {"SEQ_CLS": "classify", "TOKEN_CLS": "token_classify", "FEATURE_EXTRACTION": "embed"}
TASK_OF_KIND = {kind: task for task, kind in KIND_OF_TASK.items()} | {"rerank": "SEQ_CLS"}
_PROBLEMS = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}


def head_paths(model_type: str, task: str) -> tuple[str, ...]:
    """Module paths of the dense layers a task's head runs through, the pooler first where it has one."""
    shape = NAMES[model_type].heads.get(task)
    if shape is None:
        return ()
    return ((POOLER,) if shape.shared_pooler else ()) + tuple(path for path, _ in shape.layers)


def build_head(
    backbone: Backbone, task: str, kind: str | None, config: Mapping[str, Any], dense: Callable[[str], Dense]
) -> Head:
    """The head of a task type ("SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION").

    Args: kind: asked by the caller, None for the usual one. config: a `transformers` config (id2label, problem_type),
    may be empty. dense: module path -> its layer, raising RefusedCheckpoint when there is none.
    """
    if task == "FEATURE_EXTRACTION":
        checked_kind(task, kind)
        return backbone.embed_head
    shape = NAMES[backbone.config.model_type].heads[task]
    layers = [replace(dense(path), activation=activation) for path, activation in shape.layers]
    shared_pooler = shape.shared_pooler
    if shared_pooler:
        pooler = replace(dense(POOLER), activation="tanh")
        shared_pooler = _is_shared(backbone, pooler)
        layers = layers if shared_pooler else [pooler, *layers]
    head = Head(kind="classify", pooling=shape.pooling, shared_pooler=shared_pooler, layers=tuple(layers))
    return labelled(head, task, kind, config, backbone.config.hidden_size)


def labelled(head: Head, task: str, kind: str | None, config: Mapping[str, Any], hidden_size: int) -> Head:
    """The head with its kind, problem and label names, of a task type and a `transformers` config.

    Raises: CorruptFile when a layer does not take what the one before it gives; RefusedCheckpoint.
    """
    _check_layers(head.layers, hidden_size)
    kind, width = checked_kind(task, kind), head.layers[-1].weight.shape[0]
    if kind == "rerank" and width != 1:
        raise RefusedCheckpoint(f"a rerank head has 1 output, this one {width}; add it as classify", param="task")
    problem = "single_label" if task == "TOKEN_CLS" else _problem(config, width, kind)
    return replace(head, kind=kind, problem=problem, labels=_labels(config, width))


def checked_kind(task: str, kind: str | None) -> str:
    """The kind of head: the usual one of the task type, or the one asked for where it fits."""
    if kind is not None and TASK_OF_KIND[kind] != task:
        raise RefusedCheckpoint(f"the checkpoint is made for {task}, not for {kind}; leave the task out", param="task")
    return kind or KIND_OF_TASK[task]


def backbone_dense(backbone: Backbone, path: str) -> Dense:
    """The layer at `path` as the backbone's own folder has it: its pooler, or the head it was saved with.

    Raises: RefusedCheckpoint naming the layer when the folder has none.
    """
    if path == POOLER and backbone.config.has_pooler:
        return Dense(weight=backbone.weights["pooler.weight"], bias=backbone.weights["pooler.bias"])
    keys = (f"{path}.weight", f"{path}.bias")
    tensors = read_tensors(weight_files(backbone.folder), lambda key: key in keys)
    if keys[0] not in tensors:
        raise RefusedCheckpoint(
            f"the head needs {path}, which is neither in the checkpoint nor in the backbone's folder; save it too "
            f"(PEFT: modules_to_save with {path.split('.')[0]!r})",
            param="modules_to_save",
        )
    return Dense(weight=tensors[keys[0]], bias=tensors.get(keys[1]))


def _check_layers(layers: Sequence[Dense], width: int) -> None:
    for layer in layers:
        shape = tuple(layer.weight.shape)
        if len(shape) != 2 or shape[1] != width or (layer.bias is not None and tuple(layer.bias.shape) != shape[:1]):
            raise CorruptFile(
                f"a head layer has shape {shape}, [labels, {width}] fits; use the backbone it was made for"
            )
        width = shape[0]


def _is_shared(backbone: Backbone, pooler: Dense) -> bool:
    if not backbone.config.has_pooler or pooler.bias is None:
        return False
    weights = backbone.weights
    return torch.equal(pooler.weight, weights["pooler.weight"]) and torch.equal(pooler.bias, weights["pooler.bias"])


def _problem(config: Mapping[str, Any], width: int, kind: str) -> str:
    """As `transformers` decides it; a reranker's single logit is a logit unless the config says regression."""
    stated = config.get("problem_type")
    if stated is None:
        return "regression" if width == 1 and kind == "classify" else "single_label"
    if stated not in _PROBLEMS:
        raise RefusedCheckpoint(f"problem_type {stated!r} is not served; one of {', '.join(_PROBLEMS)} is")
    return _PROBLEMS[stated]


def _labels(config: Mapping[str, Any], width: int) -> tuple[str, ...]:
    stated = config.get("id2label") or {}
    try:
        names = {int(i): str(label) for i, label in stated.items()}
    except (AttributeError, ValueError):
        raise CorruptFile(
            f'id2label {stated!r} in config.json is not {{"0": name, "1": name, ...}}; correct it', param="id2label"
        ) from None
    wrong = sorted(names.keys() ^ set(range(width)))
    if not wrong:
        return tuple(names[i] for i in range(width))
    # Every transformers config has two default labels; real names for other classes are a mistake.
    if any(not re.fullmatch(r"LABEL_\d+", name) for name in names.values()):
        raise RefusedCheckpoint(
            f"id2label in config.json names {len(names)} labels and the head has {width} outputs, and they "
            f"differ at class {wrong[0]}; name the classes 0 to {width - 1}",
            param="id2label",
        )
    return tuple(f"LABEL_{i}" for i in range(width))
