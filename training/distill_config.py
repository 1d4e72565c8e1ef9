"""`DistillConfig`: every setting of a distillation, declared once. Flags, recipes and docs derive from it."""

from __future__ import annotations

from dataclasses import dataclass

from training.config import check_settings, setting
from training.skip_student import KINDS, SkipShape
from vbert.errors import ConfigError

__all__ = ["OBJECTIVES", "DistillConfig"]

OBJECTIVES = ("distil", "mlm")
_WINDOW = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """One student. The defaults are those of training/recipes/distill/minilm-l6-3+3.toml."""

    backbone: str = setting("", "transformers folder of the teacher; with objective mlm, of the skip backbone to adapt")
    texts: tuple[str, ...] = setting(
        (), "unlabelled text: .txt, a text a line, or .jsonl, each also with .gz", files=True
    )
    own_texts: tuple[str, ...] = setting(
        (), "text as tenants will send it; half of all batches are drawn from it", files=True
    )
    out: str = setting("", "folder to write the skip backbone to, and meanwhile how far it is")

    objective: str = setting(
        "distil", "distil: be like the teacher; mlm: adapt the local layers to a domain", choices=OBJECTIVES
    )
    kind: str = setting("trigram", "what lies below the upper layers", choices=KINDS)
    skipped: int = setting(3, "lower layers of the teacher that are replaced", at_least=1)
    lower: int = setting(3, "layers in their place", at_least=0)
    upper: tuple[int, ...] = setting((), "layers of the teacher that follow, from 0; none: all that are left", of=int)
    targets: tuple[int, ...] = setting(
        (), "states of the teacher, 0 the embeddings, that the student's are to be like; none: of its layers", of=int
    )
    attention_targets: tuple[int, ...] = setting(
        (), "layers of the teacher, from 0, that the upper ones are to attend like; none: below their states", of=int
    )
    upper_layers: str = setting(
        "frozen", "frozen: they stay the teacher's, with a plain way to them; or trained", choices=("frozen", "trained")
    )
    sinks: int = setting(2, "constant keys and values of each local layer", at_least=0)
    window: int = setting(_WINDOW, "kind window: tokens it sees", at_least=3)

    tokens: int = setting(1_000_000, "tokens to learn from, in all", at_least=1)
    batch_size: int = setting(64, "texts in one step", at_least=1)
    max_length: int = setting(64, "tokens of a text; longer ones are cut into pieces", at_least=8)
    lr: float = setting(8e-4, "highest learning rate of the lower end", at_least=0)
    upper_lr: float = setting(3.2e-4, "highest learning rate of the upper layers", at_least=0)
    weight_decay: float = setting(0.01, "AdamW's weight decay", at_least=0)
    warmup_share: float = setting(0.05, "part of the steps in which the rates rise; then they fall", at_least=0)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", at_least=0)
    backoff_steps: float = setting(0.5, "part of the steps with shortened n-grams, for the path backoff", at_least=0)
    backoff_share: float = setting(0.5, "part of the n-grams that are shortened in these", at_least=0)
    attention_loss: float = setting(0.0, "weight of the loss on attention scores, 0: none", at_least=0)
    pooled_loss: float = setting(1.0, "weight of the loss on the mean of the last states", at_least=0)
    mask_share: float = setting(0.15, "objective mlm: part of the tokens that are hidden", at_least=0)
    dtype: str = setting(
        "auto",
        "of products; weights are float32; auto: bfloat16 where the machine multiplies it itself",
        choices=("auto", "bfloat16", "float32"),
    )
    seed: int = setting(0, "of order and dropout", at_least=0)
    device: str = setting("auto", "auto is cuda where there is one", choices=("auto", "cpu", "cuda"))
    save_every_s: float = setting(120.0, "seconds between two records of how far it is, to go on from", at_least=1)

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("backoff_steps", "backoff_share", "mask_share", "warmup_share"):
            if getattr(self, name) > 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a share up to 1", param=name)
        if self.kind != "window" and self.window != _WINDOW:
            raise ConfigError(
                f"window is {self.window}, and a student of the kind {self.kind} has none; leave it out", param="window"
            )
        for name in ("backbone", "out"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is not set; give it as a flag or in the recipe", param=name)
        if not self.texts and not self.own_texts:
            raise ConfigError("there is nothing to learn from; give texts, or own_texts", param="texts")

    def shape(self, num_layers: int) -> SkipShape:
        """Of a teacher with so many layers. Raises ConfigError."""
        if not 0 < self.skipped < num_layers:
            raise ConfigError(f"skipped is {self.skipped} and the teacher has {num_layers} layers; give fewer")
        if self.lower > num_layers:
            raise ConfigError(f"lower is {self.lower}, the teacher has {num_layers} layers to begin from; give fewer")
        upper = self.upper or tuple(range(self.skipped, num_layers))
        if self.upper and not 0 <= min(upper) <= max(upper) < num_layers:
            raise ConfigError(f"upper is {upper}, the teacher has layers 0 to {num_layers - 1}; give some of these")
        if self.kind == "window" and self.upper_layers == "trained":
            raise ConfigError("a student of the kind window keeps the teacher's upper layers; give upper_layers frozen")
        if self.upper_layers == "frozen" and upper != tuple(range(self.skipped, num_layers)) and self.kind != "full":
            raise ConfigError(
                "upper leaves layers of the teacher out; what remains fits only with upper_layers trained"
            )
        return SkipShape(
            kind=self.kind, skipped=self.skipped, lower=self.lower, upper=upper, sinks=self.sinks, window=self.window
        )

    def teacher_states(self, shape: SkipShape, num_layers: int) -> tuple[int, ...]:
        """Which state of the teacher, with so many layers, each state of the student is to be like. Raises
        ConfigError."""
        states = self.targets or (self.skipped, *(layer + 1 for layer in shape.upper))
        if len(states) != len(shape.upper) + 1 or not _ascend(states, num_layers):
            raise ConfigError(
                f"targets are {states}; give {len(shape.upper) + 1} ascending ones up to {num_layers}: merge, upper "
                "layers",
                param="targets",
            )
        return states

    def teacher_attentions(self, shape: SkipShape, num_layers: int) -> tuple[int, ...]:
        """Which layer of the teacher, from 0, each upper layer is to attend like; () where that counts for nothing.
        Raises ConfigError."""
        if not self.attention_loss:
            return ()
        layers = self.attention_targets or tuple(state - 1 for state in self.teacher_states(shape, num_layers)[1:])
        if self.attention_targets and self.upper_layers == "frozen" and layers != shape.upper:
            raise ConfigError(
                f"attention_targets are {layers}, and frozen upper layers attend like themselves; leave it out, "
                "or give upper_layers trained",
                param="attention_targets",
            )
        if len(layers) != len(shape.upper) or not _ascend(layers, num_layers - 1):
            raise ConfigError(
                f"attention_targets are {layers}; give {len(shape.upper)} ascending ones up to {num_layers - 1}",
                param="attention_targets",
            )
        return layers


def _ascend(numbers: tuple[int, ...], most: int) -> bool:
    """Whether they do, from 0 or more to at most that."""
    return list(numbers) == sorted(set(numbers)) and min(numbers, default=0) >= 0 and max(numbers, default=0) <= most
