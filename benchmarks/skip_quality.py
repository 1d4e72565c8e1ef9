"""What does skipping lose? `vbert bench skip_quality --data DIR --teacher FOLDER [--skip NAME=FOLDER ...] [--append]`

STS-B (Spearman's correlation of the cosine of two embeddings, nothing trained) and tenants with a LoRA in the upper
layers, trained and tested on labelled sets, on the teacher and on each skip backbone (`vbert distill`), by path:

- *plain*: the teacher, or the plain way of a folder whose tenants are trained for all its paths at once;
- *exact*: whole n-grams, which is `compute` as well; a plain shallower encoder has only this one;
- *backoff N D*: nothing computed, a table of the N most frequent n-grams of --texts, and where they have none, n-grams
  down to D tokens; *own P*: before it a table of the tenant's own domain, the head of its training texts' n-grams that
  covers the share P of their occurrences. coverage: share of the tokens that were tested whose whole tri-gram is there.

Training and testing run on the trainer's own forward, tests in float32; the served one is tested to give the same
numbers.
With --append each set of each backbone is recorded when it is done, and what was recorded with the same settings is not
measured again.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import Neighbours, commit, describe
from benchmarks.report import NotMeasured, output_flags, publish, results
from training.batches import Dataset
from training.build import build_model
from training.config import TrainConfig, read_recipe
from training.data import Row, label_names, read_rows, tokenise
from training.evaluate import evaluate_with, main_metric, spearman
from training.export_skip import read_window
from training.loop import FitSettings, fit
from training.model import PaddedBatch, TenantModel
from training.progress import silent
from training.skip_student import WindowLower
from training.texts import read_texts
from training.train_peft import fit_settings
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.model import resolve_dtype
from vbert.ngram.counting import NgramCounts, head
from vbert.ngram.index import build_index, look_up, ngram_keys
from vbert.skip import SLOTS
from vbert.tables import count_texts
from vbert.tenant import PATHS
from vbert.tokenizer import Tokenizer

__all__ = ["main"]

SETS = ("banking77", "clinc150", "trec", "sst2", "ag_news", "mrpc", "qnli", "snips", "atis", "wnut17", "cola", "rte")
TOKEN_SETS = ("wnut17",)
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Student:
    """The teacher, or what learnt from it. window: of that kind, the lower end, on the teacher's backbone, and the
    first layer above it."""

    folder: Path
    backbone: Backbone
    window: tuple[WindowLower, int] | None = None

    @classmethod
    def read(cls, folder: Path, teacher: Backbone | None) -> Student:
        window = None if teacher is None else read_window(folder, teacher)
        if teacher is None or window is None:
            return cls(folder, read_backbone(folder))
        return cls(folder, teacher, window)

    @property
    def first_layer(self) -> int:
        """The first one above those that are skipped; 0: none is, or nothing else is there."""
        if self.window is not None:
            return self.window[1]
        return 0 if self.backbone.skip is None else self.backbone.skip.config.first_layer

    def model(self, config: TrainConfig, labels: tuple[str, ...]) -> TenantModel:
        """Of a tenant."""
        model = build_model(replace(config, paths=()) if self.window else config, self.backbone, labels)
        if self.window is not None:
            model.skip_with(*self.window)
            model.paths = ("exact",)
        return model


class Table:
    """Which n-grams are stored: indices without rows."""

    def __init__(self, counts: NgramCounts, entries: int | None, coverage: float = 1.0) -> None:
        keys, how_often = counts.result()
        keys, _ = head(keys, how_often, max_entries=entries, coverage=coverage, min_count=1)
        self._indices = [build_index(keys)]

    def beside(self, other: Table) -> Table:
        """Both, asked as one."""
        both = copy(self)
        both._indices = self._indices + other._indices
        return both

    def kept(self, batch: PaddedBatch, depth: int) -> Tensor:
        """[B, n] tokens of the longest stored n-gram around each token, 0 where there is none."""
        assert batch.token_ids is not None
        lengths = batch.mask.sum(1).numpy()
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        keys = ngram_keys(batch.token_ids[batch.mask].numpy(), cu_seqlens)
        found = np.maximum.reduce([look_up(keys, index, depth)[1] for index in self._indices])
        kept = torch.zeros(batch.mask.shape, dtype=torch.int64)
        kept[batch.mask] = torch.from_numpy(found.astype(np.int64))
        return kept


class Stored:
    """A model's forward where nothing is computed but what a table has; counts how often it has all."""

    def __init__(self, model: TenantModel, table: Table, depth: int) -> None:
        self._model, self._table, self._depth = model, table, depth
        self._whole = self._tokens = 0

    def __call__(self, batch: PaddedBatch) -> Tensor:
        kept = self._table.kept(batch, self._depth)
        self._whole += int((kept == SLOTS).sum())
        self._tokens += int(batch.mask.sum())
        output: Tensor = self._model(replace(batch, kept=kept))
        return output

    @property
    def coverage(self) -> float:
        return round(self._whole / max(1, self._tokens), 4)


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    neighbours = Neighbours()
    backbones = {"teacher": Student.read(Path(args.teacher), None)}
    for item in args.skip:
        name, _, folder = item.partition("=")
        if not folder:
            raise ConfigError(f"skip has {item!r}; write NAME=FOLDER")
        backbones[name] = Student.read(Path(folder), backbones["teacher"].backbone)
        if not _learnt(args, backbones[name], bool(args.texts)):
            raise ConfigError(
                f"paths {' '.join(args.paths)} leave none of {name}; backoff needs --texts, plain its layers"
            )
    rows: list[dict[str, Any]] = []
    done = _recorded(args, backbones) if args.append else set()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        work = list(itertools.product(("stsb", *args.sets), args.seeds, backbones))
        task = bar.add_task("skip_quality", total=len(work))
        tables = _tables(args, backbones)
        for i, (data, seed, name) in enumerate(work):
            bar.update(task, description=f"{name}: {data}, seed {seed}")
            if (name, data, seed) in done:
                pass
            elif data != "stsb":
                rows += [_told(name, data, seed, row) for row in _tenant(args, backbones[name], data, seed, tables)]
            elif seed == args.seeds[0]:
                rows += [_told(name, data, seed, row) for row in _stsb(args, backbones[name], tables)]
            bar.advance(task)
            if rows and (args.append or i == len(work) - 1):
                machine = describe() | neighbours.report()
                config = _settings(args, name, backbones[name])
                result = {"benchmark": "skip_quality", "machine": machine, "commit": commit(), "config": config}
                publish(result | {"rows": rows}, args)
                rows = []


def _settings(args: argparse.Namespace, name: str, student: Student) -> dict[str, Any]:
    about = {"max_train_rows": args.max_train_rows, "epochs": args.epochs, "backbone": Path(args.teacher).name}
    about |= {"texts": [Path(file).name for file in args.texts], "entries": args.entries, "depths": args.depths}
    about |= {name: getattr(args, name) for name in ("own", "max_test_rows") if getattr(args, name)}
    if resolve_dtype(args.dtype) != torch.float32:
        about["dtype"] = "bfloat16"
    if student.backbone.skip is not None:
        about["steps"] = "as many for each path as alone"
        if {*args.paths} != {*PATHS}:
            about["paths"] = sorted(args.paths)
    return about | {"system": name, "distilled": _distilled(student)}


def _recorded(args: argparse.Namespace, backbones: dict[str, Student]) -> set[tuple[str, str, int]]:
    """System, set and seed of what was measured before with these settings."""
    try:
        before = results("skip_quality")
    except NotMeasured:
        return set()
    settings = {name: json.loads(json.dumps(_settings(args, name, backbone))) for name, backbone in backbones.items()}
    known = [result for result in before if settings.get(result["config"]["system"]) == result["config"]]
    return {(row["system"], row["set"], row["seed"]) for result in known for row in result["rows"]}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vbert bench skip_quality", description=__doc__)
    output_flags(parser)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", required=True, metavar="FOLDER")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--texts", nargs="+", default=[], help="corpus of the tables that backoff is measured with")
    parser.add_argument("--entries", type=int, nargs="+", default=[100_000, 1_000_000], help="sizes of these")
    parser.add_argument("--depths", type=int, nargs="+", default=[1], help="tokens of the shortest n-gram taken")
    parser.add_argument("--own", type=float, nargs="*", default=[], help="coverages of tables of the training texts")
    parser.add_argument("--top-layers", type=int, default=3, help="layers with a LoRA where there is no skip part")
    parser.add_argument("--max-train-rows", type=int, default=3000)
    parser.add_argument("--max-test-rows", type=int, default=0, help="drawn at random, the same for all; 0: all")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), help="of skip backbones' tenants")
    dtypes = ("auto", "bfloat16", "float32")
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="while training; tests are in float32")
    return parser.parse_args(argv)


def _told(name: str, data: str, seed: int, row: dict[str, Any]) -> dict[str, Any]:
    return {"system": name, "set": data, "seed": seed} | row


def _distilled(student: Student) -> dict[str, Any] | None:
    path = student.folder / "distilled.json"
    if not path.is_file():
        return None
    settings = json.loads(path.read_text())["settings"]
    places = ("backbone", "texts", "own_texts", "out", "device")
    return {name: value for name, value in settings.items() if name not in places}


def _tables(args: argparse.Namespace, backbones: dict[str, Student]) -> dict[int, Table]:
    """By size; of no size where nothing can back off."""
    if not args.texts or all(each.backbone.skip is None for each in backbones.values()):
        return {}
    teacher = backbones["teacher"].backbone
    counts = _counts(args.texts, Tokenizer.load(teacher.folder, teacher.config))
    return {size: Table(counts, size) for size in args.entries}


def _counts(files: Iterable[str | Path], tokenizer: Tokenizer) -> NgramCounts:
    counts = NgramCounts()
    for file in files:
        count_texts(read_texts(file), tokenizer, counts)
    return counts


def _ways(args: argparse.Namespace, student: Student, tables: dict[int, Table]) -> Iterator[tuple[str, str, Any]]:
    """Path to test, its name, and what it keeps of n-grams."""
    skip = student.backbone.skip
    if student.window is None and (skip is None or (skip.config.first_layer and "plain" in args.paths)):
        yield "plain", "plain", None
    if student.window is not None or (skip is not None and "exact" in args.paths):
        yield "exact", "exact", None
    if skip is not None and "backoff" in args.paths:
        for size, depth in itertools.product(tables, args.depths):
            yield "backoff", f"backoff {size} {depth}", (tables[size], depth)


# ---- tenants -------------------------------------------------------------------------------------------------------


def _tenant(
    args: argparse.Namespace, student: Student, data: str, seed: int, tables: dict[int, Table]
) -> Iterator[dict[str, Any]]:
    """Trained for every path of its backbone, tested on each."""
    task = "token_classify" if data in TOKEN_SETS else "classify"
    config, backbone = _config(args, student, data, task, seed, bool(tables)), student.backbone
    rows = {part: read_rows(args.data / data / f"{part}.jsonl.gz", task) for part in ("train", "dev", "test")}
    labels = label_names(rows["train"])
    if task == "classify":  # a label that nobody could learn is left out
        known = {row.target for row in rows["train"]}
        rows = {part: [row for row in of_part if row.target in known] for part, of_part in rows.items()}
    rows["train"] = _drawn(rows["train"], args.max_train_rows, seed)
    rows["test"] = _drawn(rows["test"], args.max_test_rows or len(rows["test"]), 0)
    tokenizer = Tokenizer.load(backbone.folder, backbone.config)
    parts = {name: Dataset(tokenise(part, tokenizer, labels, config.max_length)) for name, part in rows.items()}
    model, metric = student.model(config, labels), main_metric(task, labels)
    model.halve_products(resolve_dtype(args.dtype) == torch.bfloat16)
    train, dev = (parts[name].frozen(model, config.frozen_cache_bytes) for name in ("train", "dev"))

    def dev_metric() -> float:
        return float(np.mean([evaluate_with(model, dev, model, path)[metric] for path in model.paths]))

    settings: FitSettings = fit_settings(config)
    fitted = fit(model, train, dev_metric, settings, silent)
    model.halve_products(False)
    ways = list(_ways(args, student, tables))
    if args.own and "backoff" in model.paths:
        files = [args.data / data / "train.jsonl.gz"]
        own, general = _counts(files, tokenizer), tables[min(tables)]
        for share in args.own:
            ways.append(("backoff", f"backoff own {share:g}", (Table(own, None, share).beside(general), 1)))
    for path, name, stored in ways:
        forward = model if stored is None else Stored(model, *stored)
        found = evaluate_with(model, parts["test"], forward, path)
        row = {"path": name, "trained_for": list(model.paths), "metric": metric, "value": round(found[metric], 5)}
        yield (
            row
            | {"dev": round(max(fitted.dev_metrics), 5)}
            | ({"coverage": forward.coverage} if isinstance(forward, Stored) else {})
        )


def _drawn(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order[:count]]


def _learnt(args: argparse.Namespace, student: Student, backs_off: bool) -> list[str]:
    """The paths of its tenants."""
    learnt = [path for path, _, _ in _ways(args, student, {})]
    return learnt + (["backoff"] if backs_off and student.backbone.skip is not None and "backoff" in args.paths else [])


def _config(
    args: argparse.Namespace, student: Student, data: str, task: str, seed: int, backs_off: bool
) -> TrainConfig:
    backbone, skip, layers = student.backbone, student.backbone.skip, student.backbone.config.num_layers
    top = layers - student.first_layer if skip is not None or student.window is not None else 0
    recipe = read_recipe(ROOT / "training/recipes/lora.toml") | {"epochs": args.epochs, "seed": seed, "task": task}
    return TrainConfig(
        **recipe
        | {
            "backbone": str(backbone.folder),
            "train": str(args.data / data / "train.jsonl.gz"),
            "out": str(Path(tempfile.gettempdir()) / "unused.safetensors"),
            "paths": tuple(_learnt(args, student, backs_off)),
            "top_layers": top or min(layers, args.top_layers),
        }
    )


# ---- sentence similarity -------------------------------------------------------------------------------------------


def _stsb(args: argparse.Namespace, student: Student, tables: dict[int, Table]) -> Iterator[dict[str, Any]]:
    with gzip.open(args.data / "stsb" / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    config, backbone = _config(args, student, "stsb", "classify", 0, bool(tables)), student.backbone
    model = student.model(replace(config, method="head", paths=config.paths), ("a", "b")).eval()
    tokenizer = Tokenizer.load(backbone.folder, backbone.config)
    for path, name, stored in _ways(args, student, tables):
        first, second = (
            _embedded(model, tokenizer, [row[part] for row in rows], path, stored) for part in ("text", "text_b")
        )
        value = spearman((first * second).sum(1).tolist(), [float(row["label"]) for row in rows])
        yield {"path": name, "trained_for": [], "metric": "spearman", "value": round(value, 5)}


@torch.no_grad()
def _embedded(
    model: TenantModel, tokenizer: Tokenizer, texts: Sequence[str], path: str, stored: tuple[Table, int] | None
) -> Tensor:
    """[N, H], normalised mean states."""
    encoded = tokenizer.encode(texts, max_length=128, offsets=False)
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i].token_ids))
    out = torch.empty(len(texts), model.config.hidden_size)
    for begin in range(0, len(order), 64):
        chosen = order[begin : begin + 64]
        longest = len(encoded[chosen[-1]].token_ids)
        mask = torch.tensor([[j < len(encoded[i].token_ids) for j in range(longest)] for i in chosen])
        ids = torch.tensor([encoded[i].token_ids + [0] * (longest - len(encoded[i].token_ids)) for i in chosen])
        batch = PaddedBatch(mask=mask, token_ids=ids, type_ids=ids * 0, path=path)
        if stored is not None:
            batch = replace(batch, kept=stored[0].kept(batch, stored[1]))
        out[chosen] = model.mean_states(batch)
    return F.normalize(out)


if __name__ == "__main__":
    main()
