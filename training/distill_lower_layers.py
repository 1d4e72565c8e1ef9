"""Distil the lower layers of an encoder into local layers: `run(DistillConfig(...)) -> DistillReport`.

The student's states are brought near the teacher's, each in units of the teacher's variance: 0 is the teacher, 1 is to
predict the mean. In a part of the steps n-grams are shortened as a table that lacks them does it. With the objective
`mlm` the local layers of a finished skip backbone are adapted to the text of a domain, and everything else stays.

Runs are resumable: `out` holds how far one is, and the same settings go on from there, to the same result.
Sources: Wang et al. 2022, SkipBERT (ACL), whose first stage this is; Hou et al. 2023, SMILE (SIGMOD), for the domains.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.devices import training_device
from training.distill_config import DistillConfig
from training.distill_losses import DistilLoss, MaskedLoss
from training.distill_state import Progressed, begun, finished, read_state, write_state
from training.export_skip import holds_student, student_name, write_folder, write_window
from training.progress import Progress, silent
from training.skip_student import Batch, FullLower, SkipStudent, Teacher, random_kept
from training.texts import Texts, draw
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.model import resolve_dtype
from vbert.tokenizer import Tokenizer

__all__ = ["DistillReport", "run"]

_HELD_OUT = 256  # texts of each part that are measured and not learnt from
_SINK_BATCHES = 4
_LAST_PLACES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillReport:
    """before, after: losses by part, on text that was not learnt from, with whole n-grams and with shortened ones.
    fingerprint: of what was written; "" for the kind *window*, which nothing serves."""

    path: Path
    fingerprint: str
    tokens: int
    steps: int
    seconds: float
    before: dict[str, float]
    after: dict[str, float]
    before_backoff: dict[str, float]
    after_backoff: dict[str, float]


def run(config: DistillConfig, *, progress: Progress = silent) -> DistillReport:
    """Train and write the folder. Raises ConfigError, BadRequest for texts, OSError, what reading a backbone raises."""
    device = training_device(config.device)
    backbone, folder = read_backbone(config.backbone), Path(config.out)
    _check(config, backbone, folder)
    tokenizer = Tokenizer.load(backbone.folder, backbone.config)
    files = [paths for paths in (config.texts, config.own_texts) if paths]
    parts = [Texts.tokenise(paths, tokenizer, config.max_length, progress) for paths in files]
    held = [part.split(_HELD_OUT, config.seed) for part in parts]
    learnt, measured = [rest for rest, _ in held], [few for _, few in held]
    torch.manual_seed(config.seed)
    student, loss = _student(config, backbone, measured, tokenizer, device)
    run = _Run(config, student, loss, device, progress)
    before = run.measure(measured)
    state = run.train(learnt, before)
    if config.objective == "distil":  # else the positions are those of a finished student
        _extend_positions(student, config.max_length)
    if config.kind == "window":
        fingerprint = ""
        write_window(folder, student, backbone)
    else:
        fingerprint = write_folder(
            folder,
            student.cpu(),
            backbone,
            plain_way=_keeps_plain_way(config, backbone),
            name=student_name(backbone, student),
            base=backbone.skip.base if config.objective == "mlm" and backbone.skip is not None else "",
        )
    student.to(device)
    after = run.measure(measured)
    report = DistillReport(
        path=folder,
        fingerprint=fingerprint,
        tokens=state.tokens,
        steps=state.steps,
        seconds=state.seconds,
        before=state.before[0],
        after=after[0],
        before_backoff=state.before[1],
        after_backoff=after[1],
    )
    about = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in ("backbone", "out")}
    about["dtype"] = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    (folder / "distilled.json").write_text(
        json.dumps({"settings": about, "report": asdict(report) | {"path": None}}, indent=1, default=str)
    )
    finished(config)
    return report


def _check(config: DistillConfig, backbone: Backbone, folder: Path) -> None:
    """Whatever would go wrong after minutes or hours."""
    if folder.exists() and folder.resolve() == backbone.folder.resolve():
        raise ConfigError("out is the backbone's own folder; give another one", param="out")
    if holds_student(folder) and not begun(config):  # tables and tenants may have been made with it
        raise ConfigError(f"out {folder} has a finished backbone in it; delete it, or give another folder", param="out")
    if config.max_length > backbone.config.max_length:
        raise ConfigError(
            f"max_length is {config.max_length}, the backbone takes {backbone.config.max_length}; give at most that"
        )
    if config.objective == "distil":
        if backbone.skip is not None:
            raise ConfigError(f"{backbone.folder} is a skip backbone already; distil the plain one", param="backbone")
        layers = backbone.config.num_layers
        config.teacher_states(config.shape(layers), layers)
        config.teacher_attentions(config.shape(layers), layers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out {folder} cannot be made ({error.strerror}); give another place", param="out") from error


@torch.no_grad()
def _extend_positions(student: SkipStudent, trained: int) -> None:
    """Places beyond those that were trained get the mean of the last of these."""
    if not isinstance(student.lower, FullLower):
        student.lower.position[trained:] = student.lower.position[max(0, trained - _LAST_PLACES) : trained].mean(0)


def _keeps_plain_way(config: DistillConfig, backbone: Backbone) -> bool:
    if config.objective == "mlm" and backbone.skip is not None:
        return backbone.skip.config.first_layer > 0
    return config.upper_layers == "frozen" and config.kind != "full"


def _student(
    config: DistillConfig, backbone: Backbone, measured: list[Texts], tokenizer: Tokenizer, device: torch.device
) -> tuple[SkipStudent, DistilLoss | MaskedLoss]:
    if config.objective == "mlm":
        if backbone.skip is None:
            raise ConfigError(f"{backbone.folder} has no local layers to adapt; distil it first", param="backbone")
        student = SkipStudent.of(backbone).to(device)
        student.upper.requires_grad_(False)
        for name, parameter in student.lower.named_parameters():
            parameter.requires_grad_(name.startswith(("layers", "gate", "emb_norm", "position_embeddings")))
        return student, MaskedLoss(config, backbone, tokenizer).to(device)
    teacher = Teacher(backbone).to(device).eval()
    layers = backbone.config.num_layers
    shape = config.shape(layers)
    sinks = _sinks(teacher, measured, max(1, config.lower), config.sinks, device)
    student = SkipStudent(backbone, shape, sinks).to(device)
    student.upper.requires_grad_(config.upper_layers == "trained")
    states, attentions = config.teacher_states(shape, layers), config.teacher_attentions(shape, layers)
    return student, DistilLoss(config, teacher, states, attentions)


@torch.no_grad()
def _sinks(teacher: Teacher, parts: list[Texts], layers: int, count: int, device: torch.device) -> Tensor:
    """[layers, S, H]: what the first, the last and then, if more are wanted, the mean token of a text is before each
    layer, on average."""
    totals: list[Tensor] = []
    for part in parts:
        for i in range(_SINK_BATCHES):
            if i >= len(part):
                break
            batch = part.batch(np.arange(i, len(part), _SINK_BATCHES)[:64], device)
            last = batch.mask.sum(1) - 1
            states = teacher(batch)[:layers]
            rows = torch.arange(len(last), device=device)
            mask = batch.mask[..., None].float()
            three = [(s[:, 0], s[rows, last], (s * mask).sum(1) / mask.sum(1)) for s in states]
            totals.append(torch.stack([torch.stack([x.mean(0) for x in few]) for few in three]))
    mean = torch.stack(totals).mean(0)  # [layers, 3, H]
    return mean[:, [min(i, 2) for i in range(count)]].cpu()


class _Run:
    """The loop, and what it can go on from."""

    def __init__(
        self,
        config: DistillConfig,
        student: SkipStudent,
        loss: DistilLoss | MaskedLoss,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.config, self.student, self.loss, self.device, self.progress = config, student, loss, device, progress

    def train(self, parts: list[Texts], before: tuple[dict[str, float], dict[str, float]]) -> Progressed:
        config = self.config
        per_step = config.batch_size * sum(part.num_tokens / len(part) for part in parts) / len(parts)
        steps = max(1, round(config.tokens / per_step))
        optimizer = self._optimizer()
        state = read_state(config, self.student, self.loss, optimizer) or Progressed(before=before)
        batches = draw(parts, config.batch_size, config.seed)
        for _ in range(state.steps):
            next(batches)
        begin, saved = time.perf_counter() - state.seconds, time.perf_counter()
        self.student.train()
        while state.steps < steps:
            part, indices = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * _rate(state.steps, steps, config.warmup_share)
            batch = part.batch(indices, self.device)
            told = self._step(batch, optimizer)
            state.steps, state.tokens = state.steps + 1, state.tokens + int(batch.mask.sum())
            state.seconds = time.perf_counter() - begin
            self.progress(f"distilling: loss {told:.3f}", state.steps, steps)
            if time.perf_counter() - saved > config.save_every_s:
                write_state(config, self.student, self.loss, optimizer, state)
                saved = time.perf_counter()
        self.student.eval()
        return state

    def _step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
        kept = None
        if self.config.backoff_steps and float(torch.rand(())) < self.config.backoff_steps:
            kept = random_kept(batch.mask.shape, self.config.backoff_share, self.device)
        with self._autocast():
            total = sum(self.loss(self.student, batch, kept).values(), torch.zeros((), device=self.device))
        told = total.item()
        if not math.isfinite(told):
            raise ConfigError(f"the loss is {told} with lr {self.config.lr}; lower it")
        total.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return told

    @torch.no_grad()
    def measure(self, parts: list[Texts]) -> tuple[dict[str, float], dict[str, float]]:
        """Each part of the loss on held-out texts: whole n-grams, shortened n-grams."""
        self.student.eval()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            return self._measured(parts, 0.0), self._measured(parts, self.config.backoff_share)

    def _measured(self, parts: list[Texts], share: float) -> dict[str, float]:
        told: dict[str, list[float]] = {}
        for batch in _in_batches(parts, self.device):
            kept = random_kept(batch.mask.shape, share, self.device) if share else None
            with self._autocast():
                for name, value in self.loss(self.student, batch, kept).items():
                    told.setdefault(name, []).append(float(value))
        return {name: round(sum(values) / len(values), 4) for name, values in told.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        if resolve_dtype(self.config.dtype, self.device) == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _optimizer(self) -> torch.optim.Optimizer:
        upper = {id(p) for p in self.student.upper.parameters()}
        every = [*self.student.parameters(), *self.loss.parameters()]
        trained = [p for p in every if p.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) not in upper], "initial_lr": self.config.lr},
            {"params": [p for p in trained if id(p) in upper], "initial_lr": self.config.upper_lr},
        ]
        groups = [group | {"lr": group["initial_lr"]} for group in groups if group["params"]]
        return torch.optim.AdamW(groups, weight_decay=self.config.weight_decay, fused=True)


def _in_batches(parts: list[Texts], device: torch.device) -> Iterator[Batch]:
    for part in parts:
        order = np.argsort(np.diff(part.starts), kind="stable")
        for i in range(0, len(order), 64):
            yield part.batch(order[i : i + 64], device)


def _rate(step: int, steps: int, warmup_share: float) -> float:
    """Of the highest learning rate: up in a line, down as a cosine."""
    warmup = max(1, round(warmup_share * steps))
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
