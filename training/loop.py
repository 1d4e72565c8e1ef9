"""`fit`: the only training loop. AdamW, linear warm-up and decay, gradient clipping, and the best epoch on dev kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from training.batches import Dataset
from training.data import IGNORED
from training.model import TenantModel
from training.progress import Progress
from training.task_teacher import TaskLoss
from vbert.errors import ConfigError

__all__ = ["FitReport", "FitSettings", "Taught", "fit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """Numbers of one fit; training.config.TrainConfig explains them."""

    epochs: int
    batch_size: int
    lr: float
    head_lr: float
    weight_decay: float
    warmup_share: float
    label_smoothing: float
    max_grad_norm: float
    seed: int


@dataclass(frozen=True, slots=True)
class FitReport:
    """losses: mean training loss of each epoch. dev_metrics: after each epoch. best_epoch: from 0."""

    losses: tuple[float, ...]
    dev_metrics: tuple[float, ...]
    best_epoch: int


@dataclass(frozen=True, slots=True)
class Taught:
    """A teacher, and the training rows as tokens, which it reads."""

    loss: TaskLoss
    rows: Dataset


def fit(
    model: TenantModel,
    train: Dataset,
    dev_metric: Callable[[], float],
    settings: FitSettings,
    progress: Progress,
    taught: Taught | None = None,
) -> FitReport:
    """Train in place; the model is left in the state of the epoch with the highest dev metric (the first of equals).

    A model of several paths takes them in random order, and as many passes over the rows in each epoch as it has paths:
    each path gets the steps that it would get alone.

    The same model state, data and settings give the same result on the same machine and thread count: order and
    dropout come from `settings.seed`, and the caller's random state is left as it was.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    passes = len(model.paths)
    num_steps = settings.epochs * passes * -(-len(train) // settings.batch_size)
    optimizer, schedule = _optimizer(model, settings, num_steps)
    losses: list[float] = []
    metrics: list[float] = []
    best: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        for epoch in range(settings.epochs):
            model.train()
            total = 0.0
            batches = [each for _ in range(passes) for each in train.shuffled(settings.batch_size, generator)]
            turns = [path for path in model.paths for _ in range(len(batches) // passes)]
            if passes > 1:
                turns = [turns[i] for i in torch.randperm(len(turns), generator=generator).tolist()]
            for batch_idx, (indices, path) in enumerate(zip(batches, turns, strict=True)):
                loss = _loss_of_step(model, train, indices, path, settings, taught, epoch)
                total += _step(model, loss, optimizer, schedule, settings) * len(indices)
                done = epoch * (num_steps // settings.epochs) + batch_idx + 1
                progress(f"training: epoch {epoch + 1}/{settings.epochs}{_shown(losses, metrics)}", done, num_steps)
            losses.append(total / (passes * len(train)))
            metrics.append(dev_metric())
            if metrics[-1] > max(metrics[:-1], default=-float("inf")):
                best = {name: value.detach().clone() for name, value in model.state_dict().items()}
    progress(f"training: done{_shown(losses, metrics)}", num_steps, num_steps)
    model.load_state_dict(best)
    model.eval()
    return FitReport(tuple(losses), tuple(metrics), metrics.index(max(metrics)))


def _shown(losses: list[float], metrics: list[float]) -> str:
    return f", loss {losses[-1]:.3f}, dev {metrics[-1]:.3f}" if losses else ""


def _loss_of_step(
    model: TenantModel,
    train: Dataset,
    indices: list[int],
    path: str,
    settings: FitSettings,
    taught: Taught | None,
    epoch: int,
) -> Tensor:
    """Exits count less than what comes after them: 1, 2, 3, ... (docs/training.md)."""
    batch, target = train.batch(indices, model.device, path)
    traced = model.traced(batch, with_scores=taught is not None and taught.loss.attention > 0)
    losses = [_loss(model, output, target, settings.label_smoothing) for output in traced.outputs]
    if taught is not None:
        tokens = taught.rows.batch(indices, model.device)[0].tokens()
        losses[-1] = taught.loss(tokens, traced, losses[-1], epoch, model.head.target_std)
    weights = range(1, len(losses) + 1)
    return torch.stack([i * loss for i, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)


def _step(
    model: TenantModel, loss: Tensor, optimizer: torch.optim.Optimizer, schedule: LambdaLR, settings: FitSettings
) -> float:
    if not torch.isfinite(loss):
        raise ConfigError(f"the loss is {loss.item()} with lr {settings.lr} and head_lr {settings.head_lr}; lower them")
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return loss.item()


def _loss(model: TenantModel, output: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    if model.head.problem == "regression":
        return F.mse_loss(output[:, 0], target) / model.head.target_std**2
    rows, classes = output.flatten(0, -2), target.flatten()
    total = F.cross_entropy(rows, classes, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum")
    return total / max(1, int((target != IGNORED).sum()))  # a batch may have no word that left a token


def _optimizer(model: TenantModel, settings: FitSettings, num_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Two groups, deltas and head, each with its own rate; both rise over the warm-up and fall to zero at the end."""
    groups = [
        {"params": list(model.deltas.parameters()), "lr": settings.lr},
        {"params": [*model.head.parameters(), *model.exits.parameters()], "lr": settings.head_lr},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=settings.weight_decay)
    warmup_steps = max(1, round(settings.warmup_share * num_steps))

    def factor(step: int) -> float:
        return min((step + 1) / warmup_steps, max(0.0, (num_steps - step) / max(1, num_steps - warmup_steps)))

    return optimizer, LambdaLR(optimizer, factor)
