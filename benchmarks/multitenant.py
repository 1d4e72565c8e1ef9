"""How fast is one batch of many tenants? `vbert bench multitenant [--json]`

64 requests that are there at once, for 1, 4, 16 and 64 distinct LoRA tenants (r 8 on query and value) and for a mix of
all kinds, all 32 tokens long or with the lengths of real text; against the bare backbone in `transformers`, a PEFT
mixed batch, PEFT one tenant after the other, and `adapters` BatchSplit. All run in one thread, interleaved, after
their answers were compared: no number without the right answer. The engine, which has a compute thread of its own, is
measured after them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from benchmarks import ours, peers
from benchmarks.machine import Neighbours, commit, describe, has_native_bfloat16
from benchmarks.report import output_flags, publish
from benchmarks.timing import best_of, interleave
from benchmarks.workload import LENGTHS, SHAPES, Requests, make_requests, write_backbone
from runtime import EngineConfig
from runtime.lanes import use_one_heap
from vbert.errors import SelfTestFailed
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.model import Model
from vbert.reference import dense_forward
from vbert.tenant import TenantModule

__all__ = ["main"]

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}  # of a number of an L2-normalised embedding
SEEN = 10  # the tenants' embeddings differ from the backbone's by at least this many tolerances (fp32)
_console = Console(stderr=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One point of the grid. tenants: distinct LoRA tenants, or `mix`: as many tenants as requests, of every kind."""

    shape: str
    dtype: str
    lengths: str
    tenants: str

    def parameters(self, requests: Requests) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "dtype": self.dtype,
            "lengths": self.lengths,
            "tenants": self.tenants if self.tenants == "mix" else int(self.tenants),
            "requests": len(requests),
            "tokens": requests.num_tokens,
        }


@dataclass(frozen=True, slots=True)
class Setting:
    """What all cells of one shape and dtype share."""

    folder: Path
    backbone: Backbone
    model: Model
    scratch: Path
    args: argparse.Namespace

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    use_one_heap()  # as the server does; the peers gain as much
    neighbours = Neighbours()
    grid = list(_grid(args))
    with Progress(console=_console, transient=True) as bar:
        task = bar.add_task("multitenant", total=len(grid) * (args.rounds + args.warmup))
        rows = []
        for cell in grid:
            bar.update(task, description=f"{cell.shape} {cell.dtype} {cell.lengths} x{cell.tenants}")
            rows += _measure(cell, args, lambda: bar.advance(task))
    result = {
        "benchmark": "multitenant",
        "machine": describe() | {"torch_threads": args.threads} | neighbours.report(),
        "commit": commit(),
        "config": {"seed": args.seed, "rounds": args.rounds, "skipped": _skipped(args)},
        "rows": rows,
    }
    publish(result, args)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vbert bench multitenant", description=__doc__)
    output_flags(parser)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--tenants", nargs="+", default=["1", "4", "16", "64", "mix"], metavar="N|mix")
    parser.add_argument("--systems", nargs="+", default=[], help="only these systems (default: all)")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads of every system")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def _grid(args: argparse.Namespace) -> Iterator[Cell]:
    for shape in args.shapes:
        for dtype in args.dtypes:
            if dtype == "bfloat16" and not has_native_bfloat16():
                _console.print("bfloat16 is skipped: this CPU has neither AMX nor AVX512-BF16")
                continue
            for lengths in args.lengths:
                for tenants in args.tenants:
                    yield Cell(shape=shape, dtype=dtype, lengths=lengths, tenants=tenants)


def _skipped(args: argparse.Namespace) -> list[str]:
    return ["bfloat16: not native"] if "bfloat16" in args.dtypes and not has_native_bfloat16() else []


# ---- one cell ----------------------------------------------------------------------------------------------------


def _measure(cell: Cell, args: argparse.Namespace, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """OpenMP has a pool for every thread that computes, and with more pool threads than cores none of them waits awake:
    every operator then begins later. So there is one at a time, as in a server."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(args.threads,)) as lane:
            rows, modules, requests, expected = lane.submit(_interleaved, cell, args, Path(scratch), tick).result()
        if args.systems and "vbert engine" not in args.systems:
            return rows
        config = EngineConfig(
            backbone=str(Path(scratch) / "backbone"),
            store=str(Path(scratch) / "store"),
            dtype=cell.dtype,
            compute_threads=args.threads,
            default_deadline_s=600.0,  # the first round loads all tenants
        )
        with ours.InEngine(config, modules, requests) as engine:
            return rows + _timed({"vbert engine": engine}, expected, cell, requests, args, lambda: None)


def _interleaved(
    cell: Cell, args: argparse.Namespace, scratch: Path, tick: Callable[[], None]
) -> tuple[list[dict[str, Any]], Sequence[TenantModule], Requests, dict[str, Tensor]]:
    """Rows of all systems but the engine; and what the engine needs: modules, requests, and the right answers."""
    folder = write_backbone(cell.shape, scratch / "backbone", seed=args.seed)
    backbone = read_backbone(folder)
    setting = Setting(folder, backbone, Model.load(backbone, cell.dtype), scratch, args)
    requests = make_requests(
        args.requests,
        args.requests if cell.tenants == "mix" else int(cell.tenants),
        cell.lengths,
        vocab_size=backbone.config.vocab_size,
        seed=args.seed,
    )
    make = _mix_systems if cell.tenants == "mix" else _lora_systems
    systems, expected, modules = make(setting, cell, requests)
    systems = {name: run for name, run in systems.items() if not args.systems or name in args.systems}
    return _timed(systems, expected, cell, requests, args, tick), modules, requests, expected


def _timed(
    systems: Mapping[str, peers.System],
    expected: Mapping[str, Tensor],
    cell: Cell,
    requests: Requests,
    args: argparse.Namespace,
    tick: Callable[[], None],
) -> list[dict[str, Any]]:
    differences = _check(systems, expected, cell.dtype)
    timings = interleave(systems, rounds=args.rounds, warmup=args.warmup, tick=tick)
    return [
        {"system": name}
        | cell.parameters(requests)
        | timing.row(len(requests))
        | {"max_abs_diff": differences[name], "batch_size": getattr(systems[name], "batch_size", len(requests))}
        for name, timing in timings.items()
    ]


_Made = tuple[dict[str, peers.System], dict[str, Tensor], list[TenantModule]]


def _lora_systems(setting: Setting, cell: Cell, requests: Requests) -> _Made:
    """Systems of a cell with LoRA tenants, what they must answer (PEFT one by one, in float32), and the tenants."""
    num, args = int(cell.tenants), setting.args
    truth = peers.random_peft(setting.folder, num, torch.float32, seed=args.seed)
    expected = {"lora": peers.PeftOneByOne(truth, requests, 1)()}
    modules = ours.lora_modules(truth, num, setting.backbone, setting.scratch / "peft")
    peft = peers.random_peft(setting.folder, num, setting.dtype, seed=args.seed)
    split = peers.BatchSplit.model_of(setting.folder, peft, num)
    bare = peers.load_bare(setting.folder, setting.dtype)
    expected["bare"] = peers.Bare(peers.load_bare(setting.folder, torch.float32), requests, 1)()
    seen = float((expected["lora"] - expected["bare"]).abs().amax(1).min())
    if seen < SEEN * TOLERANCE["float32"]:
        raise SelfTestFailed(f"a tenant moves its embedding by {seen:.2g} only, too little to tell a wrong answer")
    padded: dict[str, Callable[[int], peers.System]] = {
        "transformers bare": lambda size: peers.Bare(bare, requests, size),
        "peft mixed batch": lambda size: peers.PeftMixed(peft, requests, size),
        "peft one by one": lambda size: peers.PeftOneByOne(peft, requests, size),
        "adapters BatchSplit": lambda size: peers.BatchSplit(split, requests, size),
    }
    wanted = {name: make for name, make in padded.items() if not args.systems or name in args.systems}
    systems: dict[str, peers.System] = {name: _at_its_best(make, len(requests)) for name, make in wanted.items()}
    modules = ours.with_self_tests(modules, requests, expected["lora"])
    return systems | _our_systems(setting, modules, requests), expected, modules


def _mix_systems(setting: Setting, cell: Cell, requests: Requests) -> _Made:
    """Ours alone: no peer serves all kinds in one batch. The answers must be those of the dense reference."""
    modules = ours.mixed_modules(setting.backbone, len(requests), seed=setting.args.seed)
    pairs = list(zip(requests.token_ids, requests.tenants, strict=True))
    expected = {
        "lora": torch.stack([dense_forward(setting.backbone, modules[t], ids, [0] * len(ids)) for ids, t in pairs]),
        "bare": torch.stack([dense_forward(setting.backbone, None, ids, [0] * len(ids)) for ids, _ in pairs]),
    }
    modules = ours.with_self_tests(modules, requests, expected["lora"])
    return _our_systems(setting, modules, requests), expected, modules


def _our_systems(setting: Setting, modules: Sequence[TenantModule], requests: Requests) -> dict[str, peers.System]:
    resident = ours.load(setting.model, setting.backbone, modules, setting.scratch)
    return {
        "vbert": ours.Packed(setting.model, resident, requests),
        "vbert without modules": ours.Packed(setting.model, None, requests),
    }


def _at_its_best(make: Callable[[int], peers.System], num_requests: int) -> peers.System:
    """The peer with the sub-batch size that is fastest on these requests."""
    sizes = {size: make(size) for size in peers.BATCH_SIZES if size <= num_requests}
    distinct = {str(getattr(system, "batches", size)): size for size, system in sizes.items()}
    return sizes[best_of({size: sizes[size] for size in distinct.values()})]


def _check(systems: Mapping[str, peers.System], expected: Mapping[str, Tensor], dtype: str) -> dict[str, float]:
    """Largest difference of each system to what it must answer. Raises SelfTestFailed beyond the tolerance."""
    differences = {}
    for name, run in systems.items():
        without = name in ("transformers bare", "vbert without modules")
        worst = float((run() - expected["bare" if without else "lora"]).abs().max())
        if not worst <= TOLERANCE[dtype]:
            raise SelfTestFailed(f"{name} is off by {worst:.3g}, the limit of {dtype} is {TOLERANCE[dtype]}")
        differences[name] = round(worst, 8)
    return differences


if __name__ == "__main__":
    main()
