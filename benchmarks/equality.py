"""Are the answers right? `vbert bench equality --models DIR [--json]`

Every reader on every real backbone under DIR, on real text: one packed batch that mixes all tenants, against the
outputs of the library each was made with, against each tenant alone, and against the dense reference, in fp32 and
bfloat16. Exit code 1 when a bound is not kept.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.equality_cases import Case, make_cases
from benchmarks.machine import ROOT, Neighbours, commit, describe
from benchmarks.ours import load
from benchmarks.report import RESULTS
from vbert.formats import Backbone, read_backbone
from vbert.model import Model, SequenceInput
from vbert.reference import dense_forward, dense_hidden
from vbert.selftest import TOLERANCES
from vbert.tenant import TenantModule
from vbert.tokenizer import Encoded, Tokenizer

__all__ = ["main"]

# fp32: of one number. cosine: of the last hidden state of one token of the bare backbone, bfloat16 against fp32.
# share: of one number of a tenant's answer, as a share of the tolerance that self-tests allow in bfloat16. A tenant's
# own cosine is reported and has no bound: with random biases the state of a separator can be so sensitive that `peft`
# itself, in bfloat16, is below what backbones keep.
BOUNDS = {"fp32_to_original": 1e-4, "fp32_alone": 1e-4, "bf16_share": 1.0, "bf16_least_cosine": 0.999}
SEPARATION = 10  # a tenant's answers differ from the bare backbone's by this many fp32 bounds at least
_console = Console(stderr=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    neighbours = Neighbours()
    folders = sorted(config.parent for config in args.models.glob("*/config.json"))
    folders = [folder for folder in folders if not args.only or folder.name in args.only]
    rows: list[dict[str, Any]] = []
    with Progress(console=_console, transient=True) as bar:
        task = bar.add_task("equality", total=len(folders))
        for folder in folders:
            bar.update(task, description=folder.name)
            rows += _measure(folder, _texts(args.text, args.inputs, args.seed))
            bar.advance(task)
    result = {
        "benchmark": "equality",
        "machine": describe() | neighbours.report(),
        "commit": commit(),
        "config": {"seed": args.seed, "inputs": args.inputs, "bounds": BOUNDS},
        "rows": rows,
    }
    if args.append:
        with (RESULTS / "equality.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
    print(json.dumps(result)) if args.json else _print_table(rows)
    return 0 if rows and all(row["kept"] for row in rows) else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vbert bench equality", description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="folder with one transformers folder a backbone")
    parser.add_argument("--only", nargs="+", default=[], help="only these folders")
    data = sorted((ROOT / "examples/data").glob("*/test.jsonl.gz"))
    parser.add_argument("--text", type=Path, nargs="+", default=data, help=".jsonl or .jsonl.gz with a text a line")
    parser.add_argument("--inputs", type=int, default=6, help="texts a tenant is asked, beside two pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--append", action="store_true", help="append the object to benchmarks/results/")
    return parser.parse_args(argv)


def _texts(files: Sequence[Path], count: int, seed: int) -> list[str | tuple[str, str]]:
    """`count` random texts of all files, and two pairs of such."""
    texts: list[str] = []
    for path in files:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            rows = [json.loads(line) for line in file if line.strip()]
        texts += [row["text"] if "text" in row else " ".join(row["tokens"]) for row in rows]
    chosen = random.Random(seed).sample(texts, count + 4)
    return [*chosen[:count], (chosen[-4], chosen[-3]), (chosen[-2], chosen[-1])]


def _measure(folder: Path, texts: Sequence[str | tuple[str, str]]) -> Iterator[dict[str, Any]]:
    backbone = read_backbone(folder)
    inputs = Tokenizer.load(folder, backbone.config).encode(texts, max_length=backbone.config.max_length, offsets=False)
    yield _backbone_row(backbone, inputs)
    with tempfile.TemporaryDirectory() as temporary:
        cases = list(make_cases(backbone, inputs, Path(temporary)))
        modules = [case.module for case in cases]
        fp32 = _Packed(backbone, "float32", modules, inputs, Path(temporary))
        bf16 = _Packed(backbone, "bfloat16", modules, inputs, Path(temporary))
        for i, case in enumerate(cases):
            yield _case_row(backbone, inputs, case, (fp32, bf16), i)


class _Packed:
    """All tenants in one packed batch of one dtype: outputs[i][j] and hidden[i][j] of tenant i and input j."""

    def __init__(
        self, backbone: Backbone, dtype: str, modules: Sequence[TenantModule], inputs: Sequence[Encoded], folder: Path
    ) -> None:
        self.model = Model.load(backbone, dtype, "cpu")
        self.tenants, self.inputs = load(self.model, backbone, modules, folder), inputs
        every = [(i, j) for i in range(len(modules)) for j in range(len(inputs))]
        random.Random(0).shuffle(every)
        batch = self.model.pack([self._sequence(i, j) for i, j in every])
        self.outputs = dict(zip(every, self.model.forward(batch), strict=True))
        hidden, starts = self.model.hidden(batch), batch.rows.cu_seqlens.tolist()
        parts = [hidden[starts[p] : starts[p + 1]].float() for p in range(len(every))]
        self.hidden = {every[place]: part for place, part in zip(batch.order, parts, strict=True)}

    def alone(self, i: int) -> list[Tensor]:
        return self.model.forward(self.model.pack([self._sequence(i, j) for j in range(len(self.inputs))]))

    def _sequence(self, i: int, j: int) -> SequenceInput:
        return SequenceInput(self.inputs[j].token_ids, self.inputs[j].type_ids, self.tenants[i])


def _backbone_row(backbone: Backbone, inputs: Sequence[Encoded]) -> dict[str, Any]:
    """Last hidden states of the bare backbone against `transformers`."""
    from transformers import AutoModel

    original = AutoModel.from_pretrained(backbone.folder, local_files_only=True, use_safetensors=True).float().eval()
    want = []
    for encoded in inputs:
        arguments = {"input_ids": torch.tensor([encoded.token_ids])}
        if backbone.config.type_vocab_size:
            arguments["token_type_ids"] = torch.tensor([encoded.type_ids])
        with torch.no_grad():
            want.append(original(**arguments).last_hidden_state[0])
    sequences = [SequenceInput(encoded.token_ids, encoded.type_ids) for encoded in inputs]
    got = {}
    for dtype in ("float32", "bfloat16"):
        model = Model.load(backbone, dtype, "cpu")
        batch = model.pack(sequences)
        got[dtype] = model.hidden(batch).float()
    expected = torch.cat([want[i] for i in batch.order])
    numbers = {
        "fp32_to_original": _distance([got["float32"]], [expected]),
        "bf16_least_cosine": float(F.cosine_similarity(got["bfloat16"], expected).min()),
    }
    return _row(backbone, "transformers", "last hidden states", numbers)


def _case_row(
    backbone: Backbone, inputs: Sequence[Encoded], case: Case, packed: tuple[_Packed, _Packed], i: int
) -> dict[str, Any]:
    fp32, bf16 = packed
    mixed = [fp32.outputs[i, j] for j in range(len(inputs))]
    half = [bf16.outputs[i, j] for j in range(len(inputs))]
    dense = [dense_forward(backbone, case.module, e.token_ids, e.type_ids) for e in inputs]
    hidden = [dense_hidden(backbone, case.module, e.token_ids, e.type_ids) for e in inputs]
    bare = [dense_hidden(backbone, None, e.token_ids, e.type_ids) for e in inputs]
    cosines = [F.cosine_similarity(bf16.hidden[i, j], hidden[j]).min() for j in range(len(inputs))]
    numbers = {
        "fp32_to_original": _distance(mixed, case.expected),
        "dense_to_original": _distance(dense, case.expected),
        "fp32_alone": _distance(mixed, fp32.alone(i)),
        "bf16_share": max(_share(a, b) for a, b in zip(half, case.expected, strict=True)),
        "bf16_tenant_cosine": float(min(cosines)),
        "effect": _distance(hidden, bare),
    }
    return _row(backbone, case.reader, case.name, numbers)


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def _share(ours: Tensor, theirs: Tensor) -> float:
    tolerance = TOLERANCES[torch.bfloat16]
    return _distance([ours], [theirs]) / (tolerance.absolute + tolerance.relative * float(theirs.abs().max()))


def _row(backbone: Backbone, reader: str, case: str, numbers: dict[str, float]) -> dict[str, Any]:
    kept = all(
        numbers[name] >= bound if name == "bf16_least_cosine" else numbers[name] < bound
        for name, bound in BOUNDS.items()
        if name in numbers
    )
    kept = kept and numbers.get("effect", 1.0) > SEPARATION * BOUNDS["fp32_to_original"]
    names = {"system": "vbert", "backbone": backbone.folder.name, "reader": reader, "case": case}
    return names | {name: _short(number) for name, number in numbers.items()} | {"kept": kept}


def _short(number: float) -> float:
    return round(number, 6) if number > 0.9 else float(f"{number:.3g}")


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    columns = ("backbone", "reader", "case", *BOUNDS, "kept")
    table = Table(*(name.replace("_", " ") for name in columns))
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in columns))
    Console(width=150).print(table)


if __name__ == "__main__":
    sys.exit(main())
