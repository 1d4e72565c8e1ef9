"""A trained student into a folder: a skip backbone, or, where it skips nothing, a plain shallower encoder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from training.skip_student import Layer, SkipStudent
from vbert.config import EncoderConfig
from vbert.errors import ConfigError
from vbert.formats.names import weight_keys
from vbert.formats.skip_folder import SKIP_MODEL_TYPE, write_skip
from vbert.formats.tensors import read_json
from vbert.formats.transformers_folder import Backbone, fingerprint
from vbert.skip import SLOTS, SkipConfig

__all__ = ["skip_weights", "write_folder"]

_OTHER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
    *("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"),
)


def write_folder(
    folder: Path, student: SkipStudent, source: Backbone, *, plain_way: bool, name: str, base: str = ""
) -> str:
    """What `vbert serve --backbone FOLDER` takes. Returns its fingerprint.

    plain_way: whether the upper layers are the teacher's, so that its lower layers stay a second way to them. base: the
    fingerprint of the skip backbone whose n-gram rows its own may stand beside. Raises ConfigError, OSError.
    """
    kind = student.shape.kind
    if kind == "window":
        raise ConfigError("a student of the kind window is for comparison; nothing serves it")
    folder.mkdir(parents=True, exist_ok=True)
    for file in _OTHER_FILES:
        if (source.folder / file).is_file():
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / file, folder / file)
    if plain_way:
        config, own = source.config, source.fingerprint
        for path in (source.folder / "config.json", *source.folder.glob("model*.safetensors*")):
            shutil.copyfile(path, folder / path.name)
    else:
        config, weights = _encoder(student, source)
        own = fingerprint(config, weights)
        keys = weight_keys(config)
        save_file({keys[n]: t for n, t in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_config_json(config, kind, name), indent=1))
    if kind == "full":
        return own
    skip = SkipConfig(
        first_layer=student.shape.skipped if plain_way else 0,
        local_layers=student.shape.lower,
        window=student.slots,
        sinks=student.shape.sinks if student.shape.lower else 0,
        max_length=len(student.merge_position),
        type_vocab_size=len(student.merge_type),
    )
    return write_skip(folder, skip, skip_weights(student), own, base)


def skip_weights(student: SkipStudent) -> dict[str, Tensor]:
    """Its tensors under the names of vbert/formats/skip_folder.py."""
    width = student.config.hidden_size
    centre = slice(0, SLOTS) if student.slots == SLOTS else slice(1, 2)

    def slots(values: Tensor) -> Tensor:
        out = torch.zeros(SLOTS, *values.shape[1:])
        out[centre] = values.detach().cpu()
        return out

    weights = {
        "position_embeddings": slots(student.position_embeddings),
        "emb_norm.weight": student.emb_norm.weight,
        "emb_norm.bias": student.emb_norm.bias,
        "gate.weight": slots(student.gate_weight),
        "gate.bias": slots(student.gate_bias),
        "merge.position_embeddings": student.merge_position,
        "merge.type_embeddings": student.merge_type,
        "merge.norm.weight": student.merge_norm.weight,
        "merge.norm.bias": student.merge_norm.bias,
    }
    for i, layer in enumerate(student.local):
        assert isinstance(layer, Layer)
        weights |= {f"layers.{i}.{name}": tensor for name, tensor in layer.state_dict().items()}
    assert weights["merge.position_embeddings"].shape[1] == width
    return {name: tensor.detach().cpu().float() for name, tensor in weights.items()}


def _encoder(student: SkipStudent, source: Backbone) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """A BERT of the layers that see the whole text. Where n-grams come first, its position and type embeddings and
    their LayerNorm are those of the merge; nothing reads them there."""
    layers = [*(student.local if student.shape.kind == "full" else ()), *student.upper]
    if student.shape.kind == "full":
        first = student.embeddings
        position, types, norm = first.position, first.kinds, first.norm
        if source.config.position_offset:
            position = position[source.config.position_offset :]
    else:
        position, types, norm = student.merge_position, student.merge_type, student.merge_norm
    weights = {
        "word_embeddings": student.word,
        "position_embeddings": position,
        "type_embeddings": types,
        "emb_norm.weight": norm.weight,
        "emb_norm.bias": norm.bias,
    }
    for i, layer in enumerate(layers):
        assert isinstance(layer, Layer)
        weights |= {f"layers.{i}.{name}": tensor for name, tensor in layer.state_dict().items()}
    config = replace(
        source.config,
        model_type="bert",
        num_layers=len(layers),
        max_length=len(position),
        type_vocab_size=len(types),
        position_offset=0,
        has_pooler=False,
    )
    return config, {name: tensor.detach().cpu().float().contiguous() for name, tensor in weights.items()}


def _config_json(encoder: EncoderConfig, kind: str, name: str) -> dict[str, object]:
    return {
        "model_type": "bert" if kind == "full" else SKIP_MODEL_TYPE,
        "_name_or_path": name,
        "num_hidden_layers": encoder.num_layers,
        "hidden_size": encoder.hidden_size,
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": encoder.ffn_size,
        "vocab_size": encoder.vocab_size,
        "max_position_embeddings": encoder.max_length,
        "type_vocab_size": encoder.type_vocab_size,
        "layer_norm_eps": encoder.layer_norm_eps,
        "hidden_act": encoder.activation,
        "pad_token_id": encoder.pad_token_id,
    }


def skip_name(source: Backbone, student: SkipStudent) -> str:
    """What the folder's model is called unless the operator says otherwise."""
    raw = read_json(source.folder / "config.json")
    whole = str(raw.get("_name_or_path") or source.folder.name).rstrip("/").split("/")[-1]
    return f"{whole}-{student.shape.kind}-{student.shape.lower}+{len(student.shape.upper)}"
