"""Safetensors files and JSON files into tensors and dicts. Nothing is unpickled: a pickle is refused by its name.

All tensors leave as fp32 host tensors, checked to be finite.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vbert.errors import CorruptFile, RefusedCheckpoint

__all__ = ["is_set", "malformed_is_corrupt", "opened", "read_json", "read_tensors", "tensor_keys", "weight_files"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_json(path: Path) -> Any:
    """Raises: CorruptFile when the file is not JSON, RefusedCheckpoint when it is not there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RefusedCheckpoint(f"{path.parent} has no {path.name}; give a folder that has one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptFile(f"{path} is not JSON ({error}); write it again") from None


def is_set(value: Any) -> bool:
    """Whether a config option asks for anything; 0 does."""
    return not (value is None or value is False or value in ("", [], {}))


@contextmanager
def malformed_is_corrupt(path: Path) -> Iterator[None]:
    """Around the reading of a checkpoint: a value of the wrong type or shape in its files is the file's fault."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} holds a value that cannot be used ({error!r}); save it again") from error


def weight_files(folder: Path, stem: str = "model", how: str = "save_pretrained") -> list[Path]:
    """The safetensors files of a folder: `stem`.safetensors, or the shards that its index names. how: what writes it.

    Raises: RefusedCheckpoint when there is none, naming the pickle that is there instead.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        shards = sorted(set(read_json(index)["weight_map"].values()))
        if any(Path(shard).name != shard for shard in shards):
            raise RefusedCheckpoint(f"{index} names files outside its folder; shards must lie beside the index")
        return [folder / shard for shard in shards]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise RefusedCheckpoint(
            f"{folder} holds {pickles[0]} and pickles are never opened; save it again as {stem}.safetensors with {how}"
        )
    raise RefusedCheckpoint(f"{folder} has no {stem}.safetensors; give a folder that has one")


def read_tensors(files: list[Path], wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Tensor]:
    """The tensors whose key is `wanted`, in fp32.

    Raises: CorruptFile for a truncated file, integers where numbers belong, NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    for path in files:
        with opened(path) as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys() if wanted(key)}  # noqa: SIM118
    return {key: _as_fp32(key, tensor) for key, tensor in tensors.items()}


def tensor_keys(files: list[Path]) -> list[str]:
    """The keys alone; no tensor is read. Raises: CorruptFile."""
    keys: list[str] = []
    for path in files:
        with opened(path) as file:
            keys += file.keys()
    return keys


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises: CorruptFile when it is none, or truncated."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{path} cannot be read ({error}); copy or save it again") from None


def _as_fp32(key: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise CorruptFile(f"{key} holds {tensor.dtype}, floating point numbers belong there; save it unquantised")
    tensor = tensor.to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise CorruptFile(f"{key} holds NaN or infinite numbers; train or save it again")
    return tensor
