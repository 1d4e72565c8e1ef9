"""`TrainConfig`: every setting of a training run, declared once. Flags, recipes and docs/training.md derive from it."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from training.data import TASKS
from vbert.config import ACTIVATIONS, LINEAR_SITES
from vbert.errors import ConfigError
from vbert.tenant import PATHS

__all__ = ["METHODS", "PLACEMENTS", "TrainConfig", "check_settings", "read_recipe", "setting"]

METHODS = ("lora", "bottleneck", "bitfit", "head")
PLACEMENTS = {
    "houlsby": ("attn.output>output", "ffn.output>output"),
    "pfeiffer": ("ffn.normed>output",),
    "parallel": ("ffn.input>output",),
}
_PATHS = ("backbone", "train", "dev", "test", "out", "teacher", "teacher_backbone")


def setting(
    default: Any,
    help_text: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    of: type[Any] = str,
    files: bool = False,
) -> Any:
    """A field with what `--help` says of it and what its value is checked against. of: what a tuple holds. files: its
    items may be words of their own, as a shell writes *.txt."""
    if choices:
        help_text += f" ({', '.join(choices)})"
    metadata = {"help": help_text, "choices": choices, "at_least": at_least, "of": of, "files": files}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One tenant. The defaults are those of training/recipes/lora.toml."""

    backbone: str = setting("", "transformers folder of the frozen backbone (safetensors)")
    train: str = setting("", "rows to learn from: .jsonl or .jsonl.gz")
    dev: str = setting("", "rows that pick the best epoch; empty: a share of the training rows is held out")
    test: str = setting("", "rows that are measured once at the end; empty: none")
    out: str = setting("", "native tenant file to write (.safetensors)")
    task: str = setting("classify", "what a row asks for; pairs are classify or regression", choices=TASKS)

    method: str = setting("lora", "what is trained beside the head; head: nothing", choices=METHODS)
    top_layers: int = setting(0, "layers that get deltas, counted from the top; 0: all", at_least=0)
    rank: int = setting(8, "lora: rank", at_least=1)
    alpha: float = setting(16.0, "lora: the update is scaled by alpha / rank", at_least=0)
    targets: tuple[str, ...] = setting(("q", "v"), "lora: the linears that are updated", choices=LINEAR_SITES)
    lora_dropout: float = setting(0.0, "lora: dropout on the rows that enter an update", at_least=0)
    bottleneck_size: int = setting(32, "bottleneck: width", at_least=1)
    placement: str = setting("pfeiffer", "bottleneck: where in a layer", choices=tuple(PLACEMENTS))
    activation: str = setting("gelu", "bottleneck: between its two layers", choices=ACTIVATIONS)

    paths: tuple[str, ...] = setting(
        (),
        "ways through a skip backbone that are learnt; none: plain, or exact where there is no plain one",
        choices=PATHS,
    )
    backoff_share: float = setting(0.5, "path backoff: part of the n-grams that are shortened", at_least=0)
    exits: tuple[int, ...] = setting(
        (),
        "task classify: layers, from 1 on, before which an answer may leave early; none: all layers are computed",
        of=int,
    )
    exit_cost: float = setting(0.0, "what leaving early may cost of the metric on dev; sets the confidence", at_least=0)
    pooling: str = setting(
        "auto", "states to one row a sequence; auto: as the backbone folder says", choices=("auto", "mean", "cls")
    )
    inner_size: int = setting(0, "width of a tanh layer in the head; 0: one linear layer", at_least=0)
    head_dropout: float = setting(0.0, "dropout before each layer of the head", at_least=0)

    teacher: str = setting("", "native file of a tenant of the plain backbone to learn from as well; empty: none")
    teacher_backbone: str = setting("", "folder of the teacher's backbone; empty: backbone, by its plain way")
    teacher_share: float = setting(0.5, "teacher: weight of its answers, that of the labels being 1 less this")
    temperature: float = setting(1.0, "teacher: its answers are softened by this", at_least=0.1)
    state_loss: float = setting(0.1, "teacher: weight of the distance to its hidden states", at_least=0)
    attention_loss: float = setting(0.0, "teacher: weight of the distance to its attention scores", at_least=0)
    state_epochs: int = setting(0, "teacher: first epochs that learn its states, and attention, only", at_least=0)
    teacher_states: tuple[int, ...] = setting(
        (), "teacher: its states, 0 the embeddings, for each layer of the student; none: the same layers", of=int
    )
    teacher_attentions: tuple[int, ...] = setting(
        (), "teacher: its layers, from 0, for the attention of each of the student; none: below teacher_states", of=int
    )

    epochs: int = setting(3, "passes over the training rows, for each of the paths", at_least=1)
    batch_size: int = setting(32, "rows in one step", at_least=1)
    lr: float = setting(1e-3, "highest learning rate of the deltas", at_least=0)
    head_lr: float = setting(5e-3, "highest learning rate of the head", at_least=0)
    weight_decay: float = setting(0.01, "AdamW's weight decay", at_least=0)
    warmup_share: float = setting(0.06, "part of the steps in which the rates rise; then they fall to 0", at_least=0)
    label_smoothing: float = setting(0.0, "part of the target that is spread over all classes", at_least=0)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", at_least=0)

    max_length: int = setting(128, "tokens of a row, longer ones are cut; the tenant still serves longer", at_least=4)
    max_train_rows: int = setting(0, "rows of the training file that are used, drawn at random; 0: all", at_least=0)
    dev_share: float = setting(0.1, "part of the training rows held out where there is no dev file", at_least=0)
    frozen_cache_bytes: int = setting(
        2**30, "states of layers below the lowest delta are kept between epochs up to this size", at_least=0
    )
    dtype: str = setting(
        "float32",
        "of products while training and choosing the best epoch; what is reported in the end, and written, is float32;"
        " auto: bfloat16 where the machine multiplies it itself",
        choices=("auto", "bfloat16", "float32"),
    )
    seed: int = setting(0, "of initial weights, order and dropout", at_least=0)
    device: str = setting("auto", "auto is cuda where there is one", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0 <= self.teacher_share <= 1:
            raise ConfigError(f"teacher_share is {self.teacher_share}; give a share from 0 to 1", param="teacher_share")
        if self.teacher_states and min(self.teacher_states) < 0:
            raise ConfigError(f"teacher_states is {self.teacher_states}; states count from 0", param="teacher_states")
        if self.teacher and self.state_epochs >= self.epochs:
            raise ConfigError(f"state_epochs is {self.state_epochs} of {self.epochs} epochs; give fewer")
        if self.teacher and self.state_epochs and self.method == "head":
            raise ConfigError("a head alone learns no hidden states; leave state_epochs out", param="state_epochs")
        if self.exit_cost > 1:
            raise ConfigError(f"exit_cost is {self.exit_cost}; give a share of the metric up to 1", param="exit_cost")
        for name in ("lora_dropout", "head_dropout", "label_smoothing", "dev_share", "backoff_share"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a share below 1")
        if self.seed >= 2**63:
            raise ConfigError(f"seed is {self.seed}; give a number below 2**63", param="seed")
        if self.exits and self.task != "classify":
            raise ConfigError(f"exits are of classifiers; leave them out for task {self.task}", param="exits")
        if not self.targets:
            raise ConfigError("targets is empty; give linears, or method head to train no deltas", param="targets")


def check_settings(config: Any) -> None:
    """Every field of a dataclass made with `setting`. Raises ConfigError."""
    for each in fields(config):
        _check(each.name, getattr(config, each.name), each.default, each.metadata)


def _check(name: str, value: Any, default: Any, rules: Any) -> None:
    wanted = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; give a value like {default!r}", param=name)
    if bad := [
        v for v in (value if isinstance(value, tuple) else [value]) if rules["choices"] and v not in rules["choices"]
    ]:
        raise ConfigError(f"{name} is {bad[0]!r}; use {', '.join(rules['choices'])}", param=name)
    if isinstance(value, tuple) and not all(isinstance(each, rules["of"]) for each in value):
        raise ConfigError(f"{name} is {value!r}; give {rules['of'].__name__} values", param=name)
    if isinstance(value, tuple) and rules["choices"] and len({*value}) < len(value):
        raise ConfigError(f"{name} is {','.join(value)}; give each of them once", param=name)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; give a finite number", param=name)
    if rules["at_least"] is not None and not value >= rules["at_least"]:
        raise ConfigError(f"{name} is {value}; it must be at least {rules['at_least']}", param=name)


def read_recipe(path: Path | str, config: type[Any] = TrainConfig) -> dict[str, Any]:
    """The settings of a TOML recipe, as keywords of `config`. Paths in it are relative to its own folder."""
    path = Path(path)
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read ({error}); give a TOML file") from None
    if unknown := sorted(settings.keys() - {each.name for each in fields(config)}):
        raise ConfigError(f"recipe {path} sets {unknown[0]!r}, which is no setting; docs/training.md lists them")
    folder = path.resolve().parent
    return {
        name: tuple(value) if isinstance(value, list) else str(folder / value) if name in _PATHS else value
        for name, value in settings.items()
    }
