"""FastPTM, Fig. 4: what a change to another fully fine-tuned model takes. `vbert bench fastptm_switch [--json]`

For each shape, two fine-tuned models with a classifier head, in turns:

- *swap*: ours. The tenant's module is in memory: its batch is computed by an encoder of views (`Encoder.of_tenant`);
- *load*: ours. The module is read into a slot that another one left, from the page cache or from the disk, and hashed;
  *again*: it is not hashed, since nobody wrote to the file after it was;
- *copy*: a plain copy of as many bytes from memory to memory, and *read*: of the file into memory;
- *full, as coded*: the authors' baseline builds the model, loads the original checkpoint into it, then the fine-tuned
  one; *full, fair*: the model is built once, `load_state_dict` reads the fine-tuned file.

Each is followed by the same forward of one text, whose time is not counted. Swapped answers are compared, bit for bit,
with those after a fresh load.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from transformers import logging as transformers_logging

from benchmarks.machine import Neighbours, commit, describe
from benchmarks.plots import Panel, draw, plot_flag
from benchmarks.report import output_flags, publish
from benchmarks.workload import ALL_SHAPES, write_backbone
from runtime.blobs import digest_of
from runtime.module_files import ModuleFiles
from vbert.arena import Arena, ResidentTenant
from vbert.checkpoint import write_tenant
from vbert.encoder import Encoder
from vbert.formats import read_backbone, read_tenant
from vbert.header import read_header
from vbert.model import Model, SequenceInput

__all__ = ["fine_tuned", "main", "panels"]

_IDS = [101, 2023, 2003, 1037, 3231, 102]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="vbert bench fastptm_switch", description=__doc__)
    output_flags(parser)
    plot_flag(parser)
    parser.add_argument("--shapes", nargs="+", choices=tuple(ALL_SHAPES), default=["minilm-l6", "12x768"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="where the models are written (default: the system's folder)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    neighbours = Neighbours()
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for shape in bar.track(args.shapes, description="models"):
            with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
                rows += _measure(shape, Path(folder), args)
    result = {
        "benchmark": "fastptm_switch",
        "machine": describe() | neighbours.report(),
        "commit": commit(),
        "config": {name: getattr(args, name) for name in ("rounds", "threads")},
        "rows": rows,
    }
    publish(result, args)
    if args.plot is not None:
        draw(args.plot, panels(rows))


def panels(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """Fig. 4."""
    series: dict[str, dict[str, float]] = {}
    for row in rows:
        series.setdefault(row["shape"], {})[row["system"].replace(", ", ",\n")] = row["p50_ms"]
    return [Panel(title="a change to another full model", x="", y="ms", series=series, scale="log")]


def _measure(shape: str, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    original = write_backbone(shape, folder / "original", seed=0)
    tuned = [fine_tuned(original, folder / f"tuned{i}", seed=i + 1) for i in range(2)]
    backbone = read_backbone(original)
    model = Model.load(backbone, "float32", "cpu")
    arena = Arena(backbone.config, backbone.fingerprint, model.dtype, 8 * 2**30)
    files = [_native(tuned[i], backbone, folder) for i in range(2)]
    sides = [_load(arena, file) for file in files]
    fresh = [_answer(model, side) for side in sides]
    built = AutoModelForSequenceClassification.from_pretrained(tuned[0]).eval()
    num_bytes = files[0].stat().st_size
    source, target = (torch.empty(num_bytes, dtype=torch.uint8).fill_(1) for _ in range(2))
    spare: dict[str, Any] = {}

    seen = ModuleFiles(lambda digest: folder / digest)

    def load(i: int, witness: ModuleFiles | None = None) -> None:
        spare["tenant"] = _load(arena, files[i], witness)

    def full_as_coded(i: int) -> None:
        other = AutoModelForSequenceClassification.from_pretrained(original, num_labels=2)
        other.load_state_dict(load_file(tuned[i] / "model.safetensors"), strict=False)
        spare["model"] = other.eval()

    systems: dict[str, tuple[Callable[[int], object], Callable[[int], object]]] = {
        "swap": (lambda i: Encoder.of_tenant(backbone.config, sides[i]), lambda i: None),
        "load, page cache": (load, lambda i: _release(arena, spare)),
        "load again, page cache": (lambda i: load(i, seen), lambda i: _release(arena, spare)),
        "load, disk": (load, lambda i: _release(arena, spare, files[i])),
        "copy": (lambda i: target.copy_(source), lambda i: None),
        "read, page cache": (lambda i: files[i].read_bytes(), lambda i: None),
        "read, disk": (lambda i: files[i].read_bytes(), lambda i: _forget(files[i])),
        "full, as coded": (full_as_coded, lambda i: spare.pop("model", None)),
        "full, fair": (lambda i: built.load_state_dict(load_file(tuned[i] / "model.safetensors")), lambda i: None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for done in range(args.rounds + 1):
        for name, (switch, before) in systems.items():
            before(done % 2)
            begin = time.perf_counter()
            switch(done % 2)
            if done:
                seconds[name].append(time.perf_counter() - begin)
            assert torch.equal(_answer(model, sides[done % 2]), fresh[done % 2])
    fair = float(np.median(seconds["full, fair"]))
    return [
        {
            "shape": shape,
            "system": name,
            "bytes": num_bytes,
            "p50_ms": round(1e3 * float(np.median(values)), 4),
            "p25_ms": round(1e3 * float(np.percentile(values, 25)), 4),
            "p75_ms": round(1e3 * float(np.percentile(values, 75)), 4),
            "fair_to_this": round(fair / float(np.median(values)), 2),
        }
        for name, values in seconds.items()
    ]


def fine_tuned(original: Path, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(original, num_labels=2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1e-3 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder


def _native(folder: Path, backbone: Any, scratch: Path) -> Path:
    data = write_tenant(read_tenant(folder, backbone))
    path = scratch / digest_of(data)
    path.write_bytes(data)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


def _answer(model: Model, tenant: Any) -> torch.Tensor:
    return model.forward(model.pack([SequenceInput(_IDS, [0] * len(_IDS), tenant)]))[0].clone()


def _load(arena: Arena, file: Path, witness: ModuleFiles | None = None) -> ResidentTenant:
    header = read_header(file)
    reservation = arena.reserve(header, file.name)
    assert reservation is not None, "the arena has room for all of them"
    return arena.fill(reservation, file, witness)


def _release(arena: Arena, spare: dict[str, Any], forgotten: Path | None = None) -> None:
    if (tenant := spare.pop("tenant", None)) is not None:
        arena.release(tenant)
    if forgotten is not None:
        _forget(forgotten)


def _forget(path: Path) -> None:
    """Drop the file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
