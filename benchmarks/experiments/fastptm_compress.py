"""FastPTM: what is lost when a fine-tuned model becomes a small tenant. `vbert bench fastptm_compress --data DIR`

For each set, all weights of the backbone and a classifier are trained by `transformers`, the model is compressed as
`vbert tenants compress` does it, and each tenant answers the rows of the test set by `Model.forward` in float32:

- *whole*: the model as own weights, and *but tables*: the same with the embeddings of the backbone, for which there is
  no delta: what is lost there, no rank brings back;
- *rank R*: the change of each linear as a low-rank delta, and *density D*: its largest numbers as a sparse one;
- *LoRA R*: no model, but a LoRA that `vbert train` makes of the same rows with training/recipes/lora.toml.

agreement: part of the rows with the same best label as by the model in `transformers`; logit_max, logit_mean: how far
logits are from its own. bytes: in memory; fits: how many such tenants take as much memory as the model. A result holds
one set, and is there when that is done.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup
from transformers import logging as transformers_logging

from benchmarks.machine import Neighbours, commit, describe
from benchmarks.plots import Panel, draw, plot_flag
from benchmarks.report import ROOT, output_flags, publish
from benchmarks.serving import BACKBONE
from runtime.blobs import digest_of
from training.batches import Dataset
from training.config import TrainConfig, read_recipe
from training.data import Row, label_names, read_rows, tokenise
from training.model import PaddedBatch
from training.train_peft import run
from vbert.arena import Arena
from vbert.checkpoint import write_tenant
from vbert.formats import Backbone, read_backbone, read_tenant
from vbert.formats.compressed import Compression, compress_folder
from vbert.formats.convert import to_own_file
from vbert.formats.transformers_head import own_weights, read_whole_model
from vbert.header import read_header
from vbert.model import Model, SequenceInput
from vbert.tenant import TenantModule
from vbert.tokenizer import Tokenizer

__all__ = ["main", "panels"]

_EPOCHS = {"trec": 4, "banking77": 8, "sst2": 4}
_MAX_LENGTH = 128
_TEST_BATCH = 64
_ARENA_BYTES = 2 * 2**30  # address space, not memory
_CPU = torch.device("cpu")

Result = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    transformers_logging.set_verbosity_error()
    backbone = read_backbone(args.backbone)
    settings = {name: getattr(args, name) for name in ("batch_size", "lr", "max_train_rows", "max_test_rows", "seed")}
    every: list[Result] = []
    for name in args.sets:
        neighbours, rows = Neighbours(), []
        for row in _measure(name, backbone, args):
            rows.append({"set": name} | row)
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        result = {
            "benchmark": "fastptm_compress",
            "machine": describe() | neighbours.report(),
            "commit": commit(),
            "config": settings | {"epochs": _epochs(name, args), "backbone": backbone.name},
            "rows": rows,
        }
        publish(result, args)
        every += rows
    if args.plot:
        draw(args.plot, panels(every))


def panels(rows: Sequence[Result]) -> list[Panel]:
    """Accuracy over rank, one line a set; at the end that of the whole model."""
    series: dict[str, dict[object, float]] = {}
    for row in [*(row for row in rows if row.get("rank")), *(row for row in rows if row["system"] == "whole")]:
        series.setdefault(row["set"], {})[row.get("rank") or "whole"] = row["accuracy"]
    return [Panel(title="what low ranks keep of a model", x="rank", y="accuracy", series=series, bars=False)]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vbert bench fastptm_compress", description=__doc__)
    output_flags(parser)
    plot_flag(parser)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder a set", metavar="DIR")
    parser.add_argument("--backbone", default=str(BACKBONE), metavar="FOLDER")
    parser.add_argument("--sets", nargs="+", default=list(_EPOCHS))
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--densities", type=float, nargs="*", default=[0.001, 0.01, 0.05])
    parser.add_argument("--lora", type=int, nargs="*", default=[8], metavar="RANK")
    parser.add_argument("--epochs", type=int, help="of every set (default: 4; of banking77, for its many classes, 8)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-4, help="the highest, of all weights")
    parser.add_argument("--max-train-rows", type=int, default=3000)
    parser.add_argument("--max-test-rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, help="keeps models; those found are not trained again", metavar="FOLDER")
    return parser.parse_args(argv)


def _epochs(name: str, args: argparse.Namespace) -> int:
    return args.epochs or _EPOCHS.get(name, 4)


@dataclass(frozen=True, slots=True)
class Task:
    """One set: its labels, and the rows that are learnt and tested."""

    name: str
    labels: tuple[str, ...]
    train: Dataset
    test: Dataset

    @classmethod
    def read(cls, name: str, backbone: Backbone, args: argparse.Namespace) -> Task:
        train, test = (read_rows(args.data / name / f"{part}.jsonl.gz", "classify") for part in ("train", "test"))
        labels, tokenizer = label_names(train), Tokenizer.load(backbone.folder, backbone.config)
        drawn = _drawn(train, args.max_train_rows, args.seed), _drawn(test, args.max_test_rows, 0)
        return cls(name, labels, *(Dataset(tokenise(rows, tokenizer, labels, _MAX_LENGTH)) for rows in drawn))

    @property
    def targets(self) -> Tensor:
        """[N] classes of the test rows."""
        return torch.stack([example.target for example in self.test.examples])


def _drawn(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """As `vbert train` draws them."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order[:count]]


def _measure(name: str, backbone: Backbone, args: argparse.Namespace) -> Iterator[Result]:
    task = Task.read(name, backbone, args)
    with tempfile.TemporaryDirectory() as scratch:
        kept = (args.models or Path(scratch)) / name
        if not kept.exists():
            _fine_tune(backbone, task, args).save_pretrained(kept)
        expected = _theirs(AutoModelForSequenceClassification.from_pretrained(kept).eval(), task.test)
        server = Server(backbone, Path(scratch))
        whole, model_bytes = server.answers(write_tenant(read_tenant(kept, backbone)), task.test)
        yield {"system": "whole"} | _judged(whole, expected, task, model_bytes, model_bytes)
        answers, num_bytes = server.answers(write_tenant(_but_tables(kept, backbone)), task.test)
        yield {"system": "but tables"} | _judged(answers, expected, task, num_bytes, model_bytes)
        for compression in _compressions(args):
            compressed = compress_folder(kept, backbone, compression)
            answers, num_bytes = server.answers(to_own_file(compressed.module, backbone), task.test)
            row = {"system": _name(compression), "rank": compression.max_rank, "lost_part": round(compressed.error, 4)}
            yield row | _judged(answers, expected, task, num_bytes, model_bytes)
        for rank in args.lora:
            file = _train_lora(name, rank, args, Path(scratch) / "lora.safetensors")
            answers, num_bytes = server.answers(file.read_bytes(), task.test)
            yield {"system": f"LoRA {rank}"} | _judged(answers, expected, task, num_bytes, model_bytes)


def _but_tables(folder: Path, backbone: Backbone) -> TenantModule:
    module, original = read_whole_model(folder, backbone)
    tables = {name: weight for name, weight in backbone.weights.items() if "." not in name}
    return replace(module, deltas=tuple(own_weights(replace(original, weights=original.weights | tables))))


def _compressions(args: argparse.Namespace) -> Iterator[Compression]:
    for rank in args.ranks:
        yield Compression(max_rank=rank, max_error=0.0, max_density=0.0)
    for density in args.densities:
        yield Compression(max_rank=0, max_density=density)


def _name(compression: Compression) -> str:
    return f"rank {compression.max_rank}" if compression.max_rank else f"density {100 * compression.max_density:g} %"


def _judged(answers: Tensor, expected: Tensor, task: Task, num_bytes: int, model_bytes: int) -> Result:
    apart = (answers - expected).abs()
    return {
        "accuracy": _share(answers.argmax(1) == task.targets),
        "agreement": _share(answers.argmax(1) == expected.argmax(1)),
        "logit_max": round(float(apart.max()), 6),
        "logit_mean": round(float(apart.mean()), 6),
        "bytes": num_bytes,
        "model_bytes": model_bytes,
        "fits": round(model_bytes / num_bytes, 1),
    }


def _share(right: Tensor) -> float:
    return round(float(right.float().mean()), 4)


# ---- models --------------------------------------------------------------------------------------------------------


def _fine_tune(backbone: Backbone, task: Task, args: argparse.Namespace) -> Any:
    """All weights, by AdamW with a linear warm-up and decay: a model of `transformers`."""
    torch.manual_seed(args.seed)
    labels = dict(enumerate(task.labels))
    model = AutoModelForSequenceClassification.from_pretrained(
        backbone.folder, num_labels=len(labels), id2label=labels, label2id={label: i for i, label in labels.items()}
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    epochs = _epochs(task.name, args)
    num_steps = epochs * -(-len(task.train) // args.batch_size)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.1 * num_steps), num_steps)
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    for _ in range(epochs):
        for indices in task.train.shuffled(args.batch_size, generator):
            batch, target = task.train.batch(indices, _CPU)
            model(**_arguments(batch), labels=target).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model


def _arguments(batch: PaddedBatch) -> dict[str, Any]:
    return {"input_ids": batch.token_ids, "token_type_ids": batch.type_ids, "attention_mask": batch.mask.long()}


@torch.no_grad()
def _theirs(model: Any, data: Dataset) -> Tensor:
    """[N, C] logits of a model of `transformers`."""
    batches = data.by_length(_TEST_BATCH)
    logits = [model(**_arguments(data.batch(indices, _CPU)[0])).logits for indices in batches]
    return _in_order(logits, batches)


def _train_lora(name: str, rank: int, args: argparse.Namespace, out: Path) -> Path:
    parts = {part: str(args.data / name / f"{part}.jsonl.gz") for part in ("train", "dev")}
    settings = {"rank": rank, "alpha": 2.0 * rank, "seed": args.seed, "max_train_rows": args.max_train_rows}
    recipe = read_recipe(ROOT / "training/recipes/lora.toml") | settings | parts
    return run(TrainConfig(**recipe | {"backbone": args.backbone, "out": str(out), "max_length": _MAX_LENGTH})).path


class Server:
    """A backbone, and one tenant at a time."""

    def __init__(self, backbone: Backbone, folder: Path) -> None:
        self._model, self._folder = Model.load(backbone, "float32", "cpu"), folder
        self._arena = Arena(backbone.config, backbone.fingerprint, self._model.dtype, _ARENA_BYTES)

    def answers(self, file: bytes, data: Dataset) -> tuple[Tensor, int]:
        """[N, C] logits by the tenant of a native file, and the bytes it takes in memory."""
        path = self._folder / digest_of(file)
        path.write_bytes(file)
        reservation = self._arena.reserve(read_header(path), path.name)
        assert reservation is not None, "the arena has room for one"
        tenant, batches = self._arena.fill(reservation, path), data.by_length(_TEST_BATCH)
        logits = []
        for indices in batches:
            examples = [data.examples[i] for i in indices]
            inputs = [SequenceInput(e.token_ids.tolist(), e.type_ids.tolist(), tenant) for e in examples]
            logits.append(torch.stack(self._model.forward(self._model.pack(inputs))))
        self._arena.release(tenant)
        path.unlink()
        return _in_order(logits, batches), tenant.num_bytes


def _in_order(parts: Sequence[Tensor], batches: Sequence[Sequence[int]]) -> Tensor:
    """The rows of all batches, by their index."""
    places = torch.tensor([i for indices in batches for i in indices])
    return torch.cat(list(parts))[places.argsort()]


if __name__ == "__main__":
    main()
