"""A `transformers` model folder into a `Backbone`: config, fp32 weights under our names, pooling, fingerprint.

config.json is read as data, never through AutoModel, so no code of a checkpoint can run. What would change the
function and is not implemented (relative key positions, cross attention, decoders, ...) is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vbert.config import ACTIVATIONS, MODEL_TYPES, EncoderConfig
from vbert.errors import CorruptFile, RefusedCheckpoint
from vbert.formats.names import NAMES, weight_keys, weight_shapes
from vbert.formats.sentence_transformers import read_embed_head
from vbert.formats.skip_folder import SKIP_MODEL_TYPE, read_skip
from vbert.formats.tensors import malformed_is_corrupt, read_json, read_tensors, weight_files
from vbert.skip import Skip
from vbert.tenant import Head

__all__ = ["Backbone", "backbone_name", "fingerprint", "read_backbone", "read_config"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Backbone:
    """One frozen encoder on the host.

    weights: fp32, our names (`weight_shapes` lists them). name: served name unless the operator gives another.
    embed_head: how the folder says sentences are pooled; mean where it says nothing. Always L2-normalised.
    fingerprint: "sha256:<hex>" over config numbers and weights; tenants carry it. skip: what can stand in for the lower
    layers, where the folder has it.
    """

    config: EncoderConfig
    weights: dict[str, Tensor]
    name: str
    embed_head: Head
    fingerprint: str
    folder: Path
    skip: Skip | None = None


def read_backbone(folder: Path | str) -> Backbone:
    """Read a folder with config.json and safetensors weights, with a task head (ignored) or without.

    Raises: RefusedCheckpoint naming what cannot be honoured, CorruptFile for bad weights.
    """
    folder = Path(folder)
    with malformed_is_corrupt(folder):
        return _read(folder)


def backbone_name(folder: Path) -> str:
    """What config.json calls the model, else the folder's own name; read without the weights."""
    path = str(read_json(folder / "config.json").get("_name_or_path") or "")
    return path.rstrip("/").split("/")[-1] or folder.resolve().name


def _read(folder: Path) -> Backbone:
    raw = read_json(folder / "config.json")
    only_skips = raw.get("model_type") == SKIP_MODEL_TYPE
    if only_skips:
        raw |= {"model_type": "bert"}
    model_type = _checked_model_type(raw)
    prefix = NAMES[model_type].prefix + "."
    files = weight_files(folder)
    tensors = read_tensors(files, lambda key: _in_base_model(key, prefix) and not key.endswith("position_ids"))
    tensors = {_modern(key.removeprefix(prefix)): tensor for key, tensor in tensors.items()}
    config = read_config(raw, has_pooler="pooler.dense.weight" in tensors)
    weights = _named(config, tensors, folder)
    own = fingerprint(config, weights)
    skip = read_skip(folder, config, own)
    if only_skips and (skip is None or skip.config.first_layer):
        raise CorruptFile(f"{folder} has only upper layers, and no skip.json that says what lies below; copy it whole")
    return Backbone(
        config=config,
        weights=weights,
        name=backbone_name(folder),
        embed_head=read_embed_head(folder, config.hidden_size),
        fingerprint=skip.fingerprint if only_skips and skip is not None else own,
        folder=folder,
        skip=skip,
    )


# What changes the function of an encoder and is not implemented: config key -> the values that are.
_HONOURED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": (None, "absolute"),
    "is_decoder": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "auto_map": (None,),
    "relative_attention_num_buckets": (None, 32),  # transformers computes with 32, whatever the config says
}


def _checked_model_type(raw: dict[str, Any]) -> str:
    model_type = str(raw.get("model_type"))
    if model_type not in MODEL_TYPES:
        raise RefusedCheckpoint(f"model_type {model_type!r} is not served; one of {', '.join(MODEL_TYPES)} is")
    for key, values in _HONOURED.items():
        if raw.get(key) not in values:
            raise RefusedCheckpoint(
                f"{key} {raw[key]!r} in config.json is not served, only {values[-1]!r} is; use a plain "
                f"{model_type} encoder",
                param=key,
            )
    return model_type


def read_config(raw: dict[str, Any], *, has_pooler: bool) -> EncoderConfig:
    """`EncoderConfig` of a config.json. Defaults are those of the `transformers` config classes."""
    model_type = _checked_model_type(raw)
    distilbert, mpnet = model_type == "distilbert", model_type == "mpnet"
    pad_token_id = raw.get("pad_token_id", 0 if model_type in ("bert", "distilbert") else 1)
    offset = {"roberta": (pad_token_id or 0) + 1, "xlm-roberta": (pad_token_id or 0) + 1, "mpnet": 2}.get(model_type, 0)
    return EncoderConfig(
        model_type=model_type,
        num_layers=_number(raw, "n_layers" if distilbert else "num_hidden_layers"),
        hidden_size=_number(raw, "dim" if distilbert else "hidden_size"),
        num_heads=_number(raw, "n_heads" if distilbert else "num_attention_heads"),
        ffn_size=_number(raw, "hidden_dim" if distilbert else "intermediate_size"),
        vocab_size=_number(raw, "vocab_size"),
        max_length=_number(raw, "max_position_embeddings") - offset,
        type_vocab_size=0 if distilbert or mpnet else int(raw.get("type_vocab_size", 2)),
        layer_norm_eps=1e-12 if distilbert else float(raw.get("layer_norm_eps", 1e-12)),
        activation=_activation(raw.get("activation" if distilbert else "hidden_act", "gelu")),
        pad_token_id=pad_token_id or 0,
        position_offset=offset,
        relative_buckets=32 if mpnet else 0,
        has_pooler=has_pooler,
    )


def _number(raw: dict[str, Any], key: str) -> int:
    value = raw.get(key)
    if type(value) is not int or value < 1:
        raise RefusedCheckpoint(f"{key} is {value!r} in config.json, a whole number above 0 belongs there", param=key)
    return value


def _activation(name: str) -> str:
    name = {"swish": "silu", "linear": "identity"}.get(name, name)
    if name not in ACTIVATIONS:
        raise RefusedCheckpoint(f"activation {name!r} is not served; one of {', '.join(ACTIVATIONS)} is")
    return name


def _in_base_model(key: str, prefix: str) -> bool:
    return key.startswith((prefix, "embeddings.", "encoder.", "transformer.", "pooler."))


def _modern(key: str) -> str:
    """Checkpoints converted from TensorFlow call a LayerNorm's weight gamma and its bias beta."""
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _named(config: EncoderConfig, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    keys, shapes = weight_keys(config), weight_shapes(config)
    if unknown := sorted(tensors.keys() - set(keys.values())):
        raise RefusedCheckpoint(f"{folder} holds {unknown[0]}, which a {config.model_type} encoder does not use")
    weights = {}
    for name, key in keys.items():
        if key not in tensors:
            raise CorruptFile(f"{folder} lacks the weight {key}; save the whole model again")
        if tuple(tensors[key].shape) != shapes[name]:
            raise CorruptFile(f"{key} has shape {tuple(tensors[key].shape)}, config.json asks for {shapes[name]}")
        weights[name] = tensors[key].contiguous()
    return weights


def fingerprint(config: EncoderConfig, weights: dict[str, Tensor]) -> str:
    """Identity of a backbone's function: equal numbers and weights, equal fingerprint, wherever the folder lies."""
    # Fields are listed: a field added to EncoderConfig later must not orphan every stored tenant.
    fields = ("model_type", "num_heads", "layer_norm_eps", "activation", "position_offset")
    digest = hashlib.sha256(json.dumps([getattr(config, field) for field in fields]).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return f"sha256:{digest.hexdigest()}"
