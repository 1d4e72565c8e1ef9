"""How many tenants does one process hold? `vbert bench density [--json]`

10 to 10,000 registered tenants (LoRA r 8, adapters with a bottleneck of 64, or a mix of all kinds), asked for in four
patterns, with room in memory for all of them, a tenth, or a hundredth, and for a size that stays the same. Every
registration, engine and peer runs in a process of its own, so that its memory is its own; the engines that are compared
take turns. Tenants of one kind repeat 16 random modules, but each has a file of its own, in bfloat16, and its bytes are
loaded as its own.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.density_cells import KINDS, POPULARITY, Cell, Serving, first_answers, register
from benchmarks.density_peers import PEERS, peer
from benchmarks.density_vllm import vllm
from benchmarks.machine import Neighbours, commit, describe
from benchmarks.report import output_flags, publish
from benchmarks.serving import BACKBONE
from benchmarks.workload import SHAPES, write_backbone
from vbert.errors import ConfigError

__all__ = ["main"]

_FIXED_MIB = 16


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    grid = list(itertools.product(args.shapes, args.kinds, args.tenants))
    every: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(dir=args.scratch) as scratch,
        Progress(console=Console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task("density", total=3 * len(grid))

        def advance(what: str) -> None:
            bar.update(task, description=what)
            bar.advance(task)

        for i, (shape, kind, tenants) in enumerate(grid):
            neighbours = Neighbours()
            folder = _backbone(args, shape, Path(scratch))
            cell = Cell(
                backbone=str(folder),
                store=str(Path(scratch) / "store"),
                shape=shape,
                kind=kind,
                tenants=tenants,
                first_round=args.first_round,
                seconds=args.seconds,
                concurrency=args.concurrency,
                threads=args.threads,
            )
            every += _measure(cell, args, advance)
            if args.append or i == len(grid) - 1:  # what took long is kept, whatever comes after it
                publish(_result(every, args, neighbours), args)
                every.clear()


def _measure(cell: Cell, args: argparse.Namespace, advance: Callable[[str], None]) -> list[dict[str, Any]]:
    where = f"{cell.shape} {cell.kind} x{cell.tenants}"
    advance(f"{where}: register")
    registered = _in_a_process_of_its_own(register, cell)
    rows = [registered]
    advance(f"{where}: serve")
    rooms = _rooms(args.budgets, registered)
    rows += _serve([replace(cell, budget=budget, budget_bytes=room) for budget, room in rooms], args.rounds)
    advance(f"{where}: first answers")
    rows += _in_a_process_of_its_own(first_answers, cell)
    shutil.rmtree(cell.store)
    if cell.kind == "lora":
        rows += [_in_a_process_of_its_own(peer, cell, name) for name in PEERS if not args.no_peers]
        rows += [_in_a_process_of_its_own(vllm, cell, args.vllm)] if args.vllm else []
    return rows


def _result(rows: Sequence[dict[str, Any]], args: argparse.Namespace, neighbours: Neighbours) -> dict[str, Any]:
    return {
        "benchmark": "density",
        "machine": describe() | neighbours.report(),
        "commit": commit(),
        "config": {name: getattr(args, name) for name in ("seconds", "rounds", "concurrency", "threads")},
        "rows": list(rows),
    }


def _serve(cells: Sequence[Cell], rounds: int) -> list[dict[str, Any]]:
    """Every pattern on every engine, in turns and rotating order; that of a fixed size has only one pattern."""
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(Serving(cell)) for cell in cells]
        for popularity in POPULARITY:
            taking_part = [
                engine
                for engine, cell in zip(engines, cells, strict=True)
                if isinstance(cell.budget, float) or popularity == "zipf"
            ]
            for engine in taking_part:
                engine.prepare(popularity)
            for done in range(rounds):
                first = done % len(taking_part)
                for engine in taking_part[first:] + taking_part[:first]:
                    engine.turn()
            for engine in taking_part:
                engine.finish(popularity)
        return [row for engine in engines for row in engine.rows]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vbert bench density", description=__doc__)
    output_flags(parser)
    parser.add_argument(
        "--backbone", type=Path, default=BACKBONE, help="of the shape minilm-l6; default: `make serve`'s"
    )
    parser.add_argument("--shapes", nargs="+", choices=("minilm-l6", *SHAPES), default=["minilm-l6"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tenants", nargs="+", type=int, default=[10, 100, 1_000, 10_000], metavar="N")
    parser.add_argument("--budgets", nargs="+", type=float, default=[1.0, 0.1, 0.01], metavar="SHARE")
    parser.add_argument(
        "--first-round",
        type=int,
        default=sys.maxsize,
        metavar="N",
        help="tenants that are asked once before anything is measured, the most popular first; default: all",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn of a pattern")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each pattern, taken by all budgets alternately")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-peers", action="store_true", help="leave PEFT and adapters out")
    parser.add_argument("--vllm", help="its command, installed in an environment of its own", metavar="BIN/vllm")
    parser.add_argument("--scratch", type=Path, help="where the stores are written (default: the system's folder)")
    return parser.parse_args(argv)


def _backbone(args: argparse.Namespace, shape: str, scratch: Path) -> Path:
    if shape in SHAPES:
        folder = scratch / shape
        return folder if folder.exists() else write_backbone(shape, folder, seed=0)
    if not (args.backbone / "config.json").exists():
        raise ConfigError(f"no backbone at {args.backbone}; run `make serve` once, or give --backbone FOLDER")
    return Path(args.backbone)


def _rooms(shares: Sequence[float], registered: Mapping[str, Any]) -> list[tuple[float | str, int]]:
    """Budgets as shares of all modules that hold any of them and leave half of the machine's memory free; and one of a
    fixed size, which is full with a hundred tenants. A share that a large module does not fit is left out."""
    limit = describe()["memory_gib"] * 2**30 / 2
    sizes = {share: int(registered["module_bytes"] * share) for share in shares}
    fit = {share: size for share, size in sizes.items() if registered["largest_module_bytes"] <= size <= limit}
    sized: list[tuple[float | str, int]] = list(fit.items())
    mib = _FIXED_MIB
    while mib * 2**20 < registered["largest_module_bytes"]:
        mib *= 2
    return [*sized, (f"{mib} MiB", mib * 2**20)]


def _in_a_process_of_its_own(function: Callable[..., Any], *args: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


if __name__ == "__main__":
    main()
