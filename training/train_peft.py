"""Train one tenant on a frozen backbone: `run(TrainConfig(...)) -> TrainReport`, jsonl in, a native tenant file out."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from training.batches import Dataset
from training.build import build_model
from training.config import TrainConfig, read_recipe
from training.data import Row, label_names, read_rows, tokenise
from training.devices import training_device
from training.evaluate import evaluate, main_metric
from training.exits import Judged, lowest_threshold
from training.export_tenant import export, write
from training.loop import FitSettings, Taught, fit
from training.model import TenantModel
from training.progress import Progress, silent
from training.task_teacher import TaskLoss, TaskTeacher
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.model import resolve_dtype
from vbert.tokenizer import Tokenizer

__all__ = ["TrainConfig", "TrainReport", "fit_settings", "read_recipe", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """dev, test: all metrics of the best epoch by name (test empty without a test file), of the first path; by_path: of
    every path, by "dev" and "test". metric: the one that chose it, its mean over the paths. exits: the confidence above
    which answers leave early, and what that gives by path (training/exits.py); empty without exits.

    best_epoch counts from 1. losses, dev_metrics: one number an epoch, in the dtype of the training; all else is of
    float32.
    """

    path: Path
    num_bytes: int
    metric: str
    dev: dict[str, float]
    test: dict[str, float]
    by_path: dict[str, dict[str, dict[str, float]]]
    exits: dict[str, Any]
    best_epoch: int
    losses: tuple[float, ...]
    dev_metrics: tuple[float, ...]
    num_labels: int
    num_parameters: int
    num_train_rows: int
    seconds: float

    @property
    def dev_metric(self) -> float:
        return self.dev[self.metric]

    @property
    def test_metric(self) -> float | None:
        return self.test.get(self.metric)


def run(config: TrainConfig, *, progress: Progress = silent) -> TrainReport:
    """Train, keep the best epoch on dev, measure it on test, write the tenant with its self-tests to `config.out`.

    Raises: ConfigError for settings, BadRequest naming file and line for rows, RefusedCheckpoint and CorruptFile for
    the backbone. Nothing is written unless all went well.
    """
    started = time.perf_counter()
    _check_paths(config)
    backbone = read_backbone(config.backbone)
    labels, parts = _read(config, backbone)
    targets = [float(e.target) for e in parts["train"].examples] if config.task == "regression" else []
    model = build_model(config, backbone, labels, targets).to(training_device(config.device))
    halves = resolve_dtype(config.dtype, model.device) != torch.float32
    model.halve_products(halves)
    metric = main_metric(config.task, labels)
    train, dev = (parts[name].frozen(model, config.frozen_cache_bytes, progress) for name in ("train", "dev"))

    def dev_metric() -> float:
        return fmean(evaluate(model, dev, path)[metric] for path in model.paths)

    taught = None
    if config.teacher:
        teacher = TaskTeacher.load(config, backbone, labels).to(model.device).eval()
        taught = Taught(TaskLoss.of(config, teacher, backbone.config.num_layers), parts["train"])
    fitted = fit(model, train, dev_metric, fit_settings(config), progress, taught)
    if halves:  # what is told and written is of float32, below the deltas too
        model.halve_products(False)
        dev = parts["dev"]
    measured = {"dev": dev} | ({"test": parts["test"]} if "test" in parts else {})
    by_path = {path: {name: evaluate(model, data, path) for name, data in measured.items()} for path in model.paths}
    results = by_path[model.paths[0]]
    told: dict[str, Any] = {**(results if model.paths == ("plain",) else by_path)}
    exits = _exits(model, measured, config.exit_cost) if model.exit_layers else {}
    if exits:
        told["exits"] = exits
    threshold = exits.get("threshold", 1.0)
    module = export(model, backbone, parts["dev"].examples, _source(config, backbone, told), threshold)
    return TrainReport(
        path=Path(config.out),
        num_bytes=write(module, Path(config.out)),
        metric=metric,
        dev=results["dev"],
        test=results.get("test", {}),
        by_path=by_path,
        exits=exits,
        best_epoch=fitted.best_epoch + 1,
        losses=fitted.losses,
        dev_metrics=fitted.dev_metrics,
        num_labels=len(labels),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_train_rows=len(train),
        seconds=time.perf_counter() - started,
    )


def _exits(model: TenantModel, measured: Mapping[str, Dataset], allowed: float) -> dict[str, Any]:
    judged = {name: {path: Judged.of(model, data, path) for path in model.paths} for name, data in measured.items()}
    threshold = lowest_threshold(list(judged["dev"].values()), allowed)
    by_path = {
        path: {name: of_path[path].report(threshold) for name, of_path in judged.items()} for path in model.paths
    }
    return {"threshold": threshold} | (by_path[model.paths[0]] if model.paths == ("plain",) else by_path)


def _check_paths(config: TrainConfig) -> None:
    for name in ("backbone", "train", "out"):
        if not getattr(config, name):
            raise ConfigError(f"{name} is not set; give it as a flag or in the recipe", param=name)
    out = Path(config.out).absolute()
    folder = next(parent for parent in out.parents if parent.exists())
    if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"out {config.out} cannot be written; give a file in a folder of yours", param="out")


def _read(config: TrainConfig, backbone: Backbone) -> tuple[tuple[str, ...], dict[str, Dataset]]:
    """Labels, and the tokenised train, dev and, if there is one, test rows.

    The labels are those of the whole training file, also where only some of its rows are used.
    """
    rows = read_rows(config.train, config.task)
    labels = ("score",) if config.task == "regression" else label_names(rows)
    if config.task != "regression" and len(labels) < 2:
        raise ConfigError(
            f"{config.train} has one label, {labels[0]!r}, and there is nothing to learn; give rows of two"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
    num_dev = 0 if config.dev else _num_held_out(config, rows)
    num_train = min(config.max_train_rows or len(rows), len(rows) - num_dev)
    parts = {"train": [rows[i] for i in order[num_dev : num_dev + num_train]]}
    parts["dev"] = read_rows(config.dev, config.task) if config.dev else [rows[i] for i in order[:num_dev]]
    if config.test:
        parts["test"] = read_rows(config.test, config.task)
    tokenizer = Tokenizer.load(backbone.folder, backbone.config)
    max_length = min(config.max_length, backbone.config.max_length)
    return labels, {name: Dataset(tokenise(part, tokenizer, labels, max_length)) for name, part in parts.items()}


def _num_held_out(config: TrainConfig, rows: list[Row]) -> int:
    count = round(config.dev_share * len(rows))
    if not 0 < count < len(rows):
        raise ConfigError(
            f"dev_share {config.dev_share} of {len(rows)} rows leaves dev or train empty; give a dev file or more rows"
        )
    return count


def fit_settings(config: TrainConfig) -> FitSettings:
    return FitSettings(**{each.name: getattr(config, each.name) for each in fields(FitSettings)})


def _source(config: TrainConfig, backbone: Backbone, results: Mapping[str, Any]) -> dict[str, Any]:
    """What people want to know of the tenant later: every setting but the places on this machine, and the metrics."""
    places = ("backbone", "train", "dev", "test", "out", "device", "teacher", "teacher_backbone")
    settings = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in places}
    return {"format": "native", "trained_on": backbone.name, "settings": settings, "results": results}
