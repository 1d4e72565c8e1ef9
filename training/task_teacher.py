"""`TaskTeacher`: a tenant of a plain backbone that another one learns from, beside the labels of its rows.

Source: the task stage of SkipBERT, Wang et al. 2022 (ACL); of soft targets, Hinton et al. 2015, arXiv:1503.02531.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.config import TrainConfig
from training.distill_losses import relative_error, score_error
from training.head import pooled
from training.model import Traced
from training.skip_layers import FullLayer
from training.skip_student import Batch, Teacher
from vbert.activations import activate
from vbert.checkpoint import read_tenant_bytes
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.reference import merge
from vbert.tenant import Bottleneck, Head, TenantModule

__all__ = ["TaskLoss", "TaskTeacher"]


class TaskTeacher(nn.Module):
    """The deltas of a tenant merged into its plain backbone, frozen, and its head."""

    def __init__(self, backbone: Backbone, module: TenantModule) -> None:
        super().__init__()
        self.encoder = Teacher(replace(backbone, weights=merge(backbone.weights, module.deltas)))
        self.head = module.head

    @classmethod
    def load(cls, config: TrainConfig, backbone: Backbone, labels: Sequence[str]) -> TaskTeacher:
        """backbone: the student's. Raises ConfigError for a tenant that cannot teach it, what reading raises."""
        plain = read_backbone(config.teacher_backbone) if config.teacher_backbone else backbone
        module = read_tenant_bytes(Path(config.teacher).read_bytes())
        if module.backbone_fingerprint != plain.fingerprint or "plain" not in module.paths:
            raise ConfigError(
                f"the teacher {config.teacher} is no tenant of {plain.folder} that goes the plain way; give "
                "teacher_backbone, or train the teacher with the path plain",
                param="teacher",
            )
        if plain.skip is not None and not plain.skip.config.first_layer:
            raise ConfigError(f"{plain.folder} has no plain way; give teacher_backbone", param="teacher_backbone")
        size, theirs = backbone.config, plain.config
        if (size.vocab_size, size.hidden_size) != (theirs.vocab_size, theirs.hidden_size):
            raise ConfigError(
                f"the teacher's backbone has {theirs.vocab_size} tokens and width {theirs.hidden_size}, the student's "
                f"{size.vocab_size} and {size.hidden_size}; take one of the same tokenizer and width",
                param="teacher_backbone",
            )
        if theirs.max_length < min(config.max_length, size.max_length):
            raise ConfigError(
                f"the teacher reads up to {theirs.max_length} tokens; give max_length {theirs.max_length} or less",
                param="max_length",
            )
        head, kind = module.head, "token_classify" if config.task == "token_classify" else "classify"
        if head.kind != kind or head.problem != ("regression" if config.task == "regression" else "single_label"):
            raise ConfigError(f"the teacher is for {head.kind}, {head.problem}, not {config.task}", param="teacher")
        if config.task != "regression" and head.labels != tuple(labels):
            raise ConfigError("the teacher has other labels than the training rows", param="teacher")
        if head.shared_pooler or any(isinstance(delta, Bottleneck) for delta in module.deltas):
            raise ConfigError(
                "a teacher with adapters between layers, or with the backbone's pooler, is not supported; train one "
                "with a LoRA",
                param="teacher",
            )
        return cls(plain, module)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        layers = (
            replace(d, weight=fn(d.weight), bias=None if d.bias is None else fn(d.bias)) for d in self.head.layers
        )
        self.head = replace(self.head, layers=tuple(layers))
        return self

    @torch.no_grad()
    def forward(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """States [B, n, H], those of the embeddings first, and what the head says, as TenantModel.forward."""
        states = self.encoder(batch)
        return states, _answers(self.head, states[-1], batch.mask)


@dataclass(frozen=True, slots=True)
class TaskLoss:
    """What a teacher adds to the loss of a step, and for how much the labels still count.

    share: of the teacher's answers against the labels. states: weight of the states, for which those after each of the
    student's layers are compared with the teacher's of these numbers. attention: weight of the attention scores, those
    of each of the student's layers with those of these layers of the teacher. first_epochs: of these two only.
    """

    teacher: TaskTeacher
    share: float
    temperature: float
    states: float
    numbers: tuple[int, ...]
    attention: float
    layers: tuple[int, ...]
    first_epochs: int

    @classmethod
    def of(cls, config: TrainConfig, teacher: TaskTeacher, num_layers: int) -> TaskLoss:
        """num_layers: of the student. Raises ConfigError."""
        count = len(teacher.encoder.layers)
        numbers = config.teacher_states or tuple(range(1, num_layers + 1))
        by_state = config.attention_loss and not config.teacher_attentions
        compares = config.state_loss or config.state_epochs or by_state
        if compares and (len(numbers) != num_layers or max(numbers) > count):
            raise ConfigError(
                f"teacher_states is {numbers}; give {num_layers} states of the teacher, up to {count}, or compare none "
                "(state_loss, state_epochs and attention_loss 0)",
                param="teacher_states",
            )
        if num_layers != count and compares and not config.teacher_states:
            raise ConfigError(
                f"the teacher has {count} layers and the student {num_layers}; give teacher_states, or compare none "
                "(state_loss, state_epochs and attention_loss 0)",
                param="teacher_states",
            )
        layers = config.teacher_attentions or tuple(number - 1 for number in numbers)
        if config.attention_loss and (len(layers) != num_layers or not 0 <= min(layers) <= max(layers) < count):
            raise ConfigError(
                f"teacher_attentions is {layers}; give {num_layers} layers of the teacher, 0 to {count - 1}",
                param="teacher_attentions",
            )
        return cls(
            teacher=teacher,
            share=config.teacher_share,
            temperature=config.temperature,
            states=config.state_loss,
            numbers=numbers,
            attention=config.attention_loss,
            layers=layers,
            first_epochs=config.state_epochs,
        )

    def __call__(self, batch: Batch, own: Traced, hard: Tensor, epoch: int, std: float) -> Tensor:
        """own: the student's. hard: the loss of its head on the labels. std: of the numbers of a regression."""
        taught, wanted = self.teacher(batch)
        mask, output = batch.mask, own.outputs[-1]
        distance = _mean([relative_error(x[mask], taught[self.numbers[i - 1]][mask]) for i, x in own.states.items()])
        attention = _mean([score_error(x, self._scores(self.layers[i], taught), mask) for i, x in own.scores.items()])
        if epoch < self.first_epochs:
            return distance + self.attention * attention
        soft = self._soft(output, wanted, mask, std)
        return self.states * distance + self.attention * attention + (1 - self.share) * hard + self.share * soft

    @torch.no_grad()
    def _scores(self, layer: int, taught: Sequence[Tensor]) -> Tensor:
        above = self.teacher.encoder.layers[layer]
        assert isinstance(above, FullLayer)
        return above.scores(taught[layer])

    def _soft(self, output: Tensor, wanted: Tensor, mask: Tensor, std: float) -> Tensor:
        if self.teacher.head.problem == "regression":
            return F.mse_loss(output, wanted) / std**2
        if output.dim() == 3:
            output, wanted = output[mask], wanted[mask]
        t = self.temperature
        soft = -(F.softmax(wanted / t, -1) * F.log_softmax(output / t, -1)).sum(-1)
        return soft.mean() * t**2


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).mean() if parts else torch.zeros(())


def _answers(head: Head, hidden: Tensor, mask: Tensor) -> Tensor:
    rows = pooled(head.pooling, hidden, mask)
    for layer in head.layers:
        rows = activate(F.linear(rows, layer.weight, layer.bias), layer.activation)
    return rows
