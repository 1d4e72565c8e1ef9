"""A `transformers` folder with a task head: over the backbone's own encoder weights a tenant that is only a head, else
one with weights of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch

from vbert.config import EMBEDDING_LAYER
from vbert.errors import RefusedCheckpoint
from vbert.formats.names import NAMES
from vbert.formats.task_head import KIND_OF_TASK, POOLER, backbone_dense, build_head
from vbert.formats.tensors import read_json, tensor_keys, weight_files
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.tenant import Dense, OwnWeights, TenantModule

__all__ = ["own_weights", "read_transformers_head", "read_whole_model"]

_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "Model": "FEATURE_EXTRACTION"}


def read_transformers_head(folder: Path, backbone: Backbone, task: str | None = None) -> TenantModule:
    """Read a whole model: its head, and all its weights unless they are the backbone's own. task: a head kind; needed
    to make a one-label classifier a reranker.

    Raises: RefusedCheckpoint for an encoder of another shape, another architecture or weights that no known head uses.
    """
    module, other = read_whole_model(folder, backbone, task)
    names = [name for name in backbone.weights if not name.startswith("pooler.")]
    if all(torch.equal(backbone.weights[name], other.weights[name]) for name in names):
        return module
    return replace(module, deltas=tuple(own_weights(other)), source=module.source | {"method": "whole"})


def own_weights(model: Backbone) -> Iterator[OwnWeights]:
    """All weights of an encoder, those of q, k and v in one."""
    for (layer, site), parts in model.config.weight_shapes().items():
        prefix = "" if layer == EMBEDDING_LAYER else f"layers.{layer}."
        if parts.keys() == {"weight"}:
            yield OwnWeights(layer=layer, site=site, weight=model.weights[site])
            continue
        sites = ("q", "k", "v") if site == "qkv" else (site,)
        both = {part: torch.cat([model.weights[f"{prefix}{each}.{part}"] for each in sites]) for part in parts}
        yield OwnWeights(layer=layer, site=site, **both)


def read_whole_model(folder: Path, backbone: Backbone, task: str | None = None) -> tuple[TenantModule, Backbone]:
    """A tenant that is only the head of a whole model, and that model's encoder, which has the shape of the backbone.

    Raises: RefusedCheckpoint for an encoder of another shape, another architecture or weights that no known head uses.
    """
    config = read_json(folder / "config.json")
    architecture = str((config.get("architectures") or [None])[0])
    peft_task = next((name for suffix, name in _TASKS.items() if architecture.endswith(suffix)), None)
    if peft_task is None:
        raise RefusedCheckpoint(
            f"architecture {architecture} is not served; a sequence or token classifier or a bare encoder is",
            param="architectures",
        )
    other = read_backbone(folder)
    _check_same_shape(backbone, other)
    used: set[str] = set()

    def dense(path: str) -> Dense:
        used.add(path)
        # A pooler that the folder left out is the backbone's own.
        return backbone_dense(backbone if path == POOLER and not other.config.has_pooler else other, path)

    head = other.embed_head if KIND_OF_TASK[peft_task] == "embed" else None
    head = head or build_head(backbone, peft_task, task, config, dense)
    _refuse_leftovers(folder, backbone.config.model_type, used)
    source = {"format": "transformers", "architecture": architecture}
    return TenantModule(backbone_fingerprint=backbone.fingerprint, deltas=(), head=head, source=source), other


def _check_same_shape(backbone: Backbone, other: Backbone) -> None:
    for field in fields(backbone.config):
        ours, theirs = getattr(backbone.config, field.name), getattr(other.config, field.name)
        if ours != theirs and field.name != "has_pooler":
            raise RefusedCheckpoint(
                f"{field.name} is {theirs!r}, the backbone's is {ours!r}; use the backbone that it was trained on",
                param=field.name,
            )


def _refuse_leftovers(folder: Path, model_type: str, used: set[str]) -> None:
    encoder = (f"{NAMES[model_type].prefix}.", "embeddings.", "encoder.", "transformer.", "pooler.")
    for key in tensor_keys(weight_files(folder)):
        if not key.startswith(encoder) and key.rpartition(".")[0] not in used:
            raise RefusedCheckpoint(f"{folder.name} holds {key}, which no head of a {model_type} encoder uses")
