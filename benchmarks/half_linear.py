"""What do packed weights and few numbers of rows save in bfloat16? `vbert bench half_linear [--backbone FOLDER]`

Batches of one, 8 and 64 texts whose tokens add up to numbers that come for the first time, and then again, through the
bare backbone on one core, computed

- *torch*: as torch multiplies: weights packed in every product, a kernel compiled for each number of rows;
- *ours*: as vbert/kernels/half_linear.py does.

Each in processes of its own, in turns, since what oneDNN compiled is kept for all of a process. grown: of its memory
that is resident, by a batch of a new size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.density_cells import memory_mib
from benchmarks.machine import Neighbours, commit, describe
from benchmarks.report import output_flags, publish
from benchmarks.serving import BACKBONE
from vbert.encoder import Encoder
from vbert.errors import KernelUnavailable
from vbert.formats.transformers_folder import read_backbone
from vbert.kernels import half_linear
from vbert.model import Model, SequenceInput, resolve_dtype
from vbert.packing import PackedBatch

__all__ = ["main"]

SYSTEMS = ("torch", "ours")
LOADS = {1: (8, 40), 8: (90, 154), 64: (600, 664)}  # texts -> tokens of all of them together, from and to
_AGAIN = 3


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    if args.measure:
        print(json.dumps(_measure(args.backbone, args.measure)))
        return
    if resolve_dtype("auto") != torch.bfloat16:
        raise KernelUnavailable("this machine does not multiply bfloat16 itself, and has nothing to measure")
    neighbours = Neighbours()
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    work = [system for _ in range(args.rounds) for system in SYSTEMS]
    for system in track(work, "half_linear", console=Console(stderr=True), transient=True):
        found[system].append(_in_a_process(args.backbone, system))
    rows = []
    for texts in LOADS:
        for system, measured in found.items():
            of = [each[str(texts)] for each in measured]
            row = {name: round(float(np.median([each[name] for each in of])), 4) for name in of[0]}
            spread = max(each["again_ms"] for each in of) / min(each["again_ms"] for each in of) - 1
            rows.append({"system": system, "texts": texts} | row | {"spread": round(spread, 4)})
    result = {
        "benchmark": "half_linear",
        "machine": describe() | neighbours.report(),
        "commit": commit(),
        "config": {"backbone": args.backbone.name, "rounds": args.rounds, "threads": 1},
        "rows": rows,
    }
    publish(result, args)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vbert bench half_linear", description=__doc__)
    output_flags(parser)
    parser.add_argument("--backbone", type=Path, default=BACKBONE, help="default: the one of `make serve`")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each system")
    parser.add_argument("--measure", choices=SYSTEMS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _in_a_process(backbone: Path, system: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.half_linear", "--backbone", str(backbone), "--measure", system]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _measure(folder: Path, system: str) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    backbone = read_backbone(folder)
    model = Model.load(backbone, "bfloat16", "cpu")
    if system == "torch":
        setattr(half_linear, "whole_rows", lambda count: count)  # noqa: B010
        model.encoder = Encoder(backbone.config, backbone.weights, torch.bfloat16, torch.device("cpu"), packs=False)
    draw, found = np.random.default_rng(0), dict[str, dict[str, float]]()
    for texts, (least, most) in LOADS.items():
        batches = [_batch(model, draw, texts, tokens) for tokens in range(least, most)]
        model.forward(_batch(model, draw, texts, most + 1))
        before = memory_mib()["rss_anon_mib"]
        first = _median_ms(model, batches)
        grown = (memory_mib()["rss_anon_mib"] - before) / len(batches)
        again = float(np.median([_median_ms(model, batches) for _ in range(_AGAIN)]))
        found[str(texts)] = {"first_ms": first, "again_ms": again, "grown_mib": grown}
    return found


def _batch(model: Model, draw: np.random.Generator, texts: int, tokens: int) -> PackedBatch:
    """Of so many texts with so many tokens together."""
    ends = sorted(draw.choice(np.arange(1, tokens), texts - 1, replace=False).tolist())
    lengths = np.diff([0, *ends, tokens]).tolist()
    size = model.config.vocab_size
    return model.pack([SequenceInput(draw.integers(0, size, n).tolist(), [0] * n) for n in lengths])


def _median_ms(model: Model, batches: Sequence[PackedBatch]) -> float:
    """Of a batch."""
    seconds = []
    for batch in batches:
        begin = time.perf_counter()
        model.forward(batch)
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds)) * 1e3


if __name__ == "__main__":
    main()
