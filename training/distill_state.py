"""How far a distillation is, in one file that is replaced as a whole: what a run that was cut goes on from."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.distill_config import DistillConfig
from vbert.errors import ConfigError, CorruptFile

__all__ = ["Progressed", "begun", "finished", "read_state", "write_state"]

_FILE = "unfinished.safetensors"
_OF_THE_RUN = ("out", "save_every_s", "device")  # settings that change nothing in the result


@dataclass(slots=True)
class Progressed:
    """before: what the losses were before the first step, with whole and with shortened n-grams."""

    before: tuple[dict[str, float], dict[str, float]]
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def write_state(
    config: DistillConfig, student: nn.Module, loss: object, optimizer: torch.optim.Optimizer, state: Progressed
) -> None:
    """Raises OSError."""
    tensors: dict[str, Tensor] = {"random": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in _parameters(student, loss).items():
        tensors[f"parameter.{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value.detach().contiguous()
    about = json.dumps({"settings": _settings(config), "state": asdict(state)})
    path = Path(config.out) / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: t.cpu().clone() for name, t in tensors.items()}, part, {"about": about})
    os.replace(part, path)


def read_state(
    config: DistillConfig, student: nn.Module, loss: object, optimizer: torch.optim.Optimizer
) -> Progressed | None:
    """Put everything where it was; None: nothing was begun. Raises ConfigError when other settings began it,
    CorruptFile."""
    path = Path(config.out) / _FILE
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        about = json.loads(header["__metadata__"]["about"])
        if about["settings"] != _settings(config):
            raise ConfigError(f"{path} was begun with other settings; delete it to begin again, or give another out")
        for name, parameter in _parameters(student, loss).items():
            parameter.data.copy_(tensors[f"parameter.{name}"])
            prefix = f"optimizer.{name}."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in own.items()}
        torch.set_rng_state(tensors["random"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        state = about["state"]
        return Progressed((state["before"][0], state["before"][1]), state["steps"], state["tokens"], state["seconds"])
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CorruptFile(f"{path} is damaged ({error}); delete it to begin again") from error


def begun(config: DistillConfig) -> bool:
    return (Path(config.out) / _FILE).exists()


def finished(config: DistillConfig) -> None:
    """The file is of no use any more."""
    (Path(config.out) / _FILE).unlink(missing_ok=True)


def _parameters(student: nn.Module, loss: object) -> dict[str, nn.Parameter]:
    named = dict(student.named_parameters())
    if isinstance(loss, nn.Module):
        named |= {f"loss.{name}": parameter for name, parameter in loss.named_parameters()}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def _settings(config: DistillConfig) -> str:
    """A digest of everything that changes the result."""
    told = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in _OF_THE_RUN}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
