"""The folder of a skip backbone: a `transformers` folder, and beside it what can stand in for its lower layers.

    config.json, model.safetensors, tokenizer files    the encoder, see transformers_folder.py
    skip.json, skip.safetensors                        the local layers, the gate and the merge, see vbert/skip.py

Where the distillation left the upper layers alone, the encoder is the plain one, whole, and `first_layer` says where
the two ways meet. Where it trained them there is no plain way: the encoder has only those layers, `first_layer` is 0,
and its config.json names the type "vbert-skip", so that nobody takes it for a plain encoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vbert.config import EncoderConfig
from vbert.errors import CorruptFile, RefusedCheckpoint
from vbert.formats.tensors import malformed_is_corrupt, read_json, read_tensors
from vbert.skip import Skip, SkipConfig, skip_shapes

__all__ = ["SKIP_MODEL_TYPE", "read_skip", "write_skip"]

SKIP_MODEL_TYPE = "vbert-skip"
_FORMAT = "vbert.skip.1"
_JSON, _TENSORS = "skip.json", "skip.safetensors"


def read_skip(folder: Path, encoder: EncoderConfig, encoder_fingerprint: str) -> Skip | None:
    """The skip part of a folder, None where it has none. Raises CorruptFile, RefusedCheckpoint."""
    path = folder / _JSON
    if not path.is_file():
        return None
    with malformed_is_corrupt(path):
        raw = read_json(path)
        if raw.pop("format") != _FORMAT:
            raise CorruptFile(f"{path} is not of the format {_FORMAT}; distil it again")
        base, claimed = raw.pop("base", None), raw.pop("fingerprint")
        config = SkipConfig(**raw)
    if encoder.relative_buckets:
        raise RefusedCheckpoint(f"{folder}: local layers of a {encoder.model_type} encoder are not served")
    if config.first_layer >= encoder.num_layers:
        raise CorruptFile(f"{path}: first_layer is {config.first_layer}, the encoder has {encoder.num_layers} layers")
    if config.max_length < encoder.max_length:
        raise CorruptFile(f"{path}: max_length is {config.max_length}, the encoder takes {encoder.max_length} tokens")
    weights, shapes = read_tensors([folder / _TENSORS]), skip_shapes(config, encoder)
    if weights.keys() != shapes.keys():
        odd = sorted(weights.keys() ^ shapes.keys())[0]
        raise CorruptFile(f"{folder / _TENSORS}: {odd} is {'missing' if odd in shapes else 'unknown'}; distil it again")
    for name, tensor in weights.items():
        if tuple(tensor.shape) != shapes[name]:
            raise CorruptFile(f"{name} has shape {tuple(tensor.shape)}, {_JSON} asks for {shapes[name]}")
    own = _fingerprint(config, weights, encoder_fingerprint)
    if own != claimed:
        raise CorruptFile(
            f"{folder}: {_JSON} was written for other weights ({claimed}, these are {own}); copy the whole folder again"
        )
    return Skip(config=config, weights=weights, fingerprint=own, base=base or own)


def write_skip(
    folder: Path, skip: SkipConfig, weights: Mapping[str, Tensor], encoder_fingerprint: str, base: str = ""
) -> str:
    """Write skip.json and skip.safetensors beside the encoder's files. Returns the fingerprint of the skip part."""
    mine = {name: tensor.detach().float().contiguous().cpu() for name, tensor in weights.items()}
    save_file(mine, folder / _TENSORS, metadata={"format": "pt"})
    fingerprint = _fingerprint(skip, mine, encoder_fingerprint)
    about = {"format": _FORMAT, "fingerprint": fingerprint, **asdict(skip)} | ({"base": base} if base else {})
    (folder / _JSON).write_text(json.dumps(about, indent=1))
    return fingerprint


def _fingerprint(skip: SkipConfig, weights: Mapping[str, Tensor], encoder_fingerprint: str) -> str:
    digest = hashlib.sha256(json.dumps([encoder_fingerprint, sorted(asdict(skip).items())]).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return f"sha256:{digest.hexdigest()}"
