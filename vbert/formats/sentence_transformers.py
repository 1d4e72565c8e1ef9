"""How a sentence-transformers folder makes one vector of the token states: modules.json and its folders into a `Head`.

Its modules run in one order only: pooling, dense layers, normalisation. What lies elsewhere, or changes the text before
it is tokenised, is refused by name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vbert.errors import CorruptFile, RefusedCheckpoint
from vbert.formats.tensors import read_json, read_tensors, weight_files
from vbert.tenant import Dense, Head

__all__ = ["read_embed_head"]

_ORDER = re.compile("Transformer( Pooling)?( Dense)*( Normalize)?")
_POOLINGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
_ACTIVATIONS = {"Tanh": "tanh", "Identity": "identity", "ReLU": "relu", "GELU": "gelu"}


def read_embed_head(folder: Path, hidden_size: int) -> Head:
    """The head of a backbone as its folder says: mean pooling where that says nothing, and always L2-normalised.

    Raises: RefusedCheckpoint naming what cannot be honoured, CorruptFile for misshapen or missing tensors.
    """
    modules = [
        (str(module["type"]).split(".")[-1], folder / module["path"]) for module in _json(folder, "modules.json")
    ]
    kinds = " ".join(kind for kind, _ in modules)
    if modules and not _ORDER.fullmatch(kinds):
        raise RefusedCheckpoint(
            f"modules {kinds} in modules.json are not served; Transformer, Pooling, Dense, Normalize in this order are"
        )
    _check_text_is_left_alone(folder)
    pooling = "mean"
    layers: list[Dense] = []
    for kind, place in modules:
        if kind == "Pooling":
            pooling = _pooling(read_json(place / "config.json"))
        elif kind == "Dense":
            layers.append(_dense(place, layers[-1].weight.shape[0] if layers else hidden_size))
    return Head(kind="embed", pooling=pooling, layers=tuple(layers), normalise=True)


def _json(folder: Path, name: str) -> Any:
    return read_json(folder / name) if (folder / name).is_file() else {}


def _check_text_is_left_alone(folder: Path) -> None:
    if _json(folder, "sentence_bert_config.json").get("do_lower_case"):
        raise RefusedCheckpoint(
            "do_lower_case true in sentence_bert_config.json is not served; let the tokenizer lower-case, or set it to "
            "false and send lower case",
            param="do_lower_case",
        )
    config = _json(folder, "config_sentence_transformers.json")
    name = config.get("default_prompt_name")
    if name is not None and (config.get("prompts") or {}).get(name):
        raise RefusedCheckpoint(
            f"default_prompt_name {name!r} in config_sentence_transformers.json is not served; set it to null and send "
            f"{config['prompts'][name]!r} with each text",
            param="default_prompt_name",
        )


def _pooling(raw: dict[str, Any]) -> str:
    # sentence-transformers 5.x writes {"pooling_mode": "mean"} beside or instead of the older flags.
    flags = {key: on for key, on in raw.items() if key.startswith("pooling_mode_")}
    chosen = [_POOLINGS.get(key, key) for key, on in flags.items() if on is True]
    if "pooling_mode" in raw or not flags:
        chosen = chosen or [str(raw.get("pooling_mode", "mean"))]
    if len(chosen) != 1 or chosen[0] not in _POOLINGS.values():
        raise RefusedCheckpoint(
            f"pooling {' + '.join(chosen) or 'by nothing'} is not served; cls or mean is", param="pooling_mode"
        )
    return chosen[0]


def _dense(folder: Path, width: int) -> Dense:
    config = read_json(folder / "config.json")
    activation = str(config.get("activation_function", "Tanh")).split(".")[-1]
    if activation not in _ACTIVATIONS:
        raise RefusedCheckpoint(
            f"activation_function {activation} of {folder.name} is not served; one of {', '.join(_ACTIVATIONS)} is",
            param="activation_function",
        )
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise RefusedCheckpoint(
                f"{key} {config[key]!r} of {folder.name} is not served, only 'sentence_embedding' is", param=key
            )
    tensors = read_tensors(weight_files(folder))
    weight, bias = tensors["linear.weight"], tensors.get("linear.bias")
    bias_shape = weight.shape[:1] if config.get("bias", True) else None
    if weight.dim() != 2 or weight.shape[1] != width or (None if bias is None else bias.shape) != bias_shape:
        raise CorruptFile(
            f"{folder.name} holds a weight {tuple(weight.shape)} and {'no' if bias is None else 'a'} bias; one that "
            f"takes {width} numbers fits, with a bias if its config.json says so: save the model again"
        )
    return Dense(weight=weight, bias=bias, activation=_ACTIVATIONS[activation])
