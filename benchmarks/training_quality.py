"""Does `training/` reach what `transformers.Trainer` with `peft` reaches? One LoRA recipe, the same rows, both sides.

    vbert bench training_quality --backbone FOLDER [--sets banking77 snips] [--seeds 0] [--append]

Same on both sides: rows, epochs, batch size, learning rates (head and LoRA apart), warm-up, decay, weight decay,
clipping, rank, alpha, targets, mean pooling and one linear layer, no dropout, batches of similar lengths, the best
epoch on dev. Different: the code, the random numbers, the tokenizer call.
Time is CPU seconds, because they hardly depend on the neighbours. About half an hour on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.machine import commit, describe
from training.config import TrainConfig, read_recipe
from training.data import Row, label_names, read_rows
from training.train_peft import run

ROOT = Path(__file__).resolve().parent.parent
PROBE = {"banking77": 0.915, "snips": 0.951}  # test accuracy of a linear probe on the frozen backbone


class PooledClassifier(nn.Module):
    """A PEFT encoder, mean pooling and one linear layer, as `transformers.Trainer` wants a model."""

    def __init__(self, encoder: nn.Module, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(hidden_size, num_labels)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        inputs = {"input_ids": input_ids, "token_type_ids": token_type_ids, "attention_mask": attention_mask}
        hidden = self.encoder(**inputs).last_hidden_state
        weights = attention_mask[..., None].to(hidden.dtype)
        logits = self.head((hidden * weights).sum(1) / weights.sum(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train_ours(config: TrainConfig) -> dict[str, Any]:
    report = run(config)
    return {"dev": report.dev["accuracy"], "test": report.test["accuracy"]}


def train_peft(config: TrainConfig) -> dict[str, Any]:
    """The same recipe in transformers.Trainer + peft; returns dev and test accuracy of the best epoch on dev."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

    set_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(config.backbone, local_files_only=True)
    parts = {name: read_rows(getattr(config, name), "classify") for name in ("train", "dev", "test")}
    labels = label_names(parts["train"])
    data = {name: [_features(row, tokenizer, labels, config) for row in rows] for name, rows in parts.items()}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = AutoModel.from_pretrained(config.backbone, local_files_only=True, add_pooling_layer=False, **no_dropout)
    modules = {"q": "query", "k": "key", "v": "value"}
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=[modules[site] for site in config.targets],
        lora_dropout=config.lora_dropout,
    )
    model = PooledClassifier(get_peft_model(base, lora), base.config.hidden_size, len(labels))
    groups = [
        {"params": [p for p in model.encoder.parameters() if p.requires_grad], "lr": config.lr},
        {"params": list(model.head.parameters()), "lr": config.head_lr},
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=64,
            warmup_ratio=config.warmup_share,
            lr_scheduler_type="linear",
            max_grad_norm=config.max_grad_norm,
            group_by_length=True,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            seed=config.seed,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            label_names=["labels"],
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data["train"],
            eval_dataset=data["dev"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda output: {"accuracy": float(np.mean(output[0].argmax(-1) == output[1]))},
            optimizers=(torch.optim.AdamW(groups, weight_decay=config.weight_decay), None),
        )
        trainer.train()
        return {name: trainer.evaluate(data[name])["eval_accuracy"] for name in ("dev", "test")}


def _features(row: Row, tokenizer: Any, labels: tuple[str, ...], config: TrainConfig) -> dict[str, Any]:
    assert isinstance(row.target, str)
    encoded = tokenizer(row.input, truncation=True, max_length=config.max_length)
    return {**encoded, "labels": labels.index(row.target)}


def measure(
    backbone: str, data: Path, sets: Sequence[str], seeds: Sequence[int], recipe: Path
) -> Iterator[dict[str, Any]]:
    """One row a set, seed and side, as soon as it is there."""
    with tempfile.TemporaryDirectory() as folder:
        for name, seed in itertools.product(sets, seeds):
            paths = {part: str(data / name / f"{part}.jsonl.gz") for part in ("train", "dev", "test")}
            paths |= {"backbone": backbone, "out": str(Path(folder) / "tenant.safetensors")}
            config = TrainConfig(**read_recipe(recipe) | paths | {"seed": seed})
            for system, train in (("vbert", train_ours), ("transformers.Trainer + peft", train_peft)):
                started_s = time.process_time()
                row = {"set": name, "system": system, "seed": seed, "linear_probe": PROBE.get(name)} | train(config)
                yield row | {"cpu_seconds": round(time.process_time() - started_s)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", required=True, help="BERT folder; the recorded numbers are of all-MiniLM-L6-v2")
    parser.add_argument("--data", type=Path, default=ROOT / "examples/data", help="folder with one folder a set")
    parser.add_argument("--sets", nargs="+", default=list(PROBE))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "training/recipes/lora.toml")
    parser.add_argument("--append", action="store_true", help="append the result to benchmarks/results/")
    args = parser.parse_args(argv)
    about = {"benchmark": "training_quality", "machine": describe(), "commit": commit()}
    rows = []
    for row in measure(args.backbone, args.data, args.sets, args.seeds, args.recipe):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    result = json.dumps(about | {"recipe": read_recipe(args.recipe), "rows": rows})
    print(result)
    if args.append:
        with (ROOT / "benchmarks/results/training_quality.jsonl").open("a", encoding="utf-8") as file:
            file.write(result + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
