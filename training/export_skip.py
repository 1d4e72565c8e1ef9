"""A trained student into a folder: a skip backbone, or, where it skips nothing, a plain shallower encoder."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.skip_student import Embeddings, FullLower, NgramLower, SkipShape, SkipStudent, WindowLower
from vbert.config import EncoderConfig
from vbert.errors import ConfigError, WrongBackbone
from vbert.formats.names import weight_keys
from vbert.formats.skip_folder import SKIP_MODEL_TYPE, write_skip
from vbert.formats.tensors import read_json
from vbert.formats.transformers_folder import Backbone, fingerprint
from vbert.skip import SLOTS, SkipConfig

__all__ = ["holds_student", "read_window", "skip_weights", "student_name", "write_folder", "write_window"]

_WINDOW, _WORDS = "window.safetensors", "word"
_SERVED = ("config.json", "model.safetensors", "model.safetensors.index.json", "skip.json", "skip.safetensors")
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
    assert isinstance(student.lower, NgramLower)
    skip = SkipConfig(
        first_layer=student.shape.skipped if plain_way else 0,
        local_layers=student.shape.lower,
        window=student.lower.slots,
        sinks=student.shape.sinks if student.shape.lower else 0,
        max_length=len(student.lower.position),
        type_vocab_size=len(student.lower.types),
    )
    return write_skip(folder, skip, skip_weights(student.lower), own, base)


def write_window(folder: Path, student: SkipStudent, teacher: Backbone) -> None:
    """The lower end of a student of the kind *window*, for `read_window`. Raises OSError."""
    tensors = {n: t.detach().cpu().contiguous() for n, t in student.lower.state_dict().items() if n != _WORDS}
    save_file(
        tensors, folder / _WINDOW, metadata={"shape": json.dumps(asdict(student.shape)), "teacher": teacher.fingerprint}
    )


def holds_student(folder: Path) -> bool:
    """Or some other backbone."""
    return any((folder / file).is_file() for file in (_WINDOW, *_SERVED))


def read_window(folder: Path, backbone: Backbone) -> tuple[WindowLower, int] | None:
    """The lower end of a student of this kind and the first layer above it; None: the folder has another student.
    backbone: its teacher. Raises OSError, WrongBackbone."""
    if not (folder / _WINDOW).is_file():
        return None
    with safe_open(folder / _WINDOW, "pt") as file:
        about = file.metadata()
        if about["teacher"] != backbone.fingerprint:
            raise WrongBackbone(
                f"{folder / _WINDOW} learnt from backbone {about['teacher'][:23]}, this one is "
                f"{backbone.fingerprint[:23]}; give its teacher"
            )
        shape = SkipShape(**json.loads(about["shape"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    lower = WindowLower(backbone, shape, torch.zeros(1, shape.sinks, backbone.config.hidden_size))
    lower.load_state_dict(tensors | {_WORDS: lower.word})
    return lower.requires_grad_(False).eval(), shape.skipped


def skip_weights(lower: NgramLower) -> dict[str, Tensor]:
    """Its tensors under the names of vbert/skip.py."""
    places = slice(0, SLOTS) if lower.slots == SLOTS else slice(1, 2)

    def slots(values: Tensor) -> Tensor:
        out = torch.zeros(SLOTS, *values.shape[1:])
        out[places] = values.detach().cpu()
        return out

    weights: dict[str, Tensor] = {
        "position_embeddings": slots(lower.position_embeddings),
        "emb_norm.weight": lower.emb_norm.weight,
        "emb_norm.bias": lower.emb_norm.bias,
        "gate.weight": slots(lower.gate_weight),
        "gate.bias": slots(lower.gate_bias),
        "merge.position_embeddings": lower.position,
        "merge.type_embeddings": lower.types,
        "merge.norm.weight": lower.norm.weight,
        "merge.norm.bias": lower.norm.bias,
    }
    for i, layer in enumerate(lower.layers):
        weights |= {f"layers.{i}.{name}": tensor for name, tensor in layer.state_dict().items()}
    return {name: tensor.detach().cpu().float() for name, tensor in weights.items()}


def _encoder(student: SkipStudent, source: Backbone) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """A BERT of the layers that see the whole text. Where n-grams come first, its position and type embeddings and
    their LayerNorm are those of the merge; nothing reads them there."""
    first = student.lower.embeddings if isinstance(student.lower, FullLower) else student.lower
    layers = [*(student.lower.layers if isinstance(student.lower, FullLower) else ()), *student.upper]
    offset = source.config.position_offset if isinstance(first, Embeddings) else 0
    weights: dict[str, Tensor] = {
        "word_embeddings": first.word,
        "position_embeddings": first.position[offset:],
        "type_embeddings": first.types,
        "emb_norm.weight": first.norm.weight,
        "emb_norm.bias": first.norm.bias,
    }
    for i, layer in enumerate(layers):
        weights |= {f"layers.{i}.{name}": tensor for name, tensor in layer.state_dict().items()}
    config = replace(
        source.config,
        model_type="bert",
        num_layers=len(layers),
        max_length=len(first.position) - offset,
        type_vocab_size=len(first.types),
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


def student_name(source: Backbone, student: SkipStudent) -> str:
    """What the folder's model is called unless the operator says otherwise."""
    raw = read_json(source.folder / "config.json")
    whole = str(raw.get("_name_or_path") or source.folder.name).rstrip("/").split("/")[-1]
    return f"{whole}-{student.shape.kind}-{student.shape.lower}+{len(student.shape.upper)}"
