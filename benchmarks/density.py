"""How many tenants does one process hold? `vbert bench density [--json]`

10 to 10,000 registered tenants (LoRA r 8, adapters with a bottleneck of 64, or a mix of all kinds), asked for in four
patterns, with room in memory for all of them, a tenth, or a hundredth. Registration and every engine run in a process
of their own, so that its memory is theirs alone. Tenants of one kind repeat 16 random modules, but each has a file of
its own and its bytes are loaded as its own.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvloop
from rich.console import Console
from rich.progress import Progress

from benchmarks.machine import Neighbours, commit, describe
from benchmarks.ours import mixed_modules, random_adapters, random_loras
from benchmarks.report import output_flags, publish
from benchmarks.serving import BACKBONE, texts
from benchmarks.workload import SHAPES, write_backbone
from runtime import Engine, EngineConfig
from vbert.arena import Arena
from vbert.checkpoint import read_tenant_bytes, write_tenant
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.header import parse_header
from vbert.model import resolve_dtype
from vbert.reference import dense_forward
from vbert.tenant import SelfTest, TenantModule

__all__ = ["main"]

KINDS: dict[str, Callable[..., list[TenantModule]]] = {
    "lora": random_loras,
    "adapter": random_adapters,
    "mix": mixed_modules,
}
POPULARITY = ("distinct", "uniform", "zipf", "identical")
ZIPF_EXPONENT = 1.1
DISTINCT_MODULES = 16
_ADDED_AT_ONCE = 16
_SHORT_TEXT = [101, 2023, 2003, 1037, 3231, 102]  # of the self-test every module carries


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One store and the room it gets: `budget` is the share of all modules' bytes that fit in memory."""

    backbone: str
    store: str
    shape: str
    kind: str
    tenants: int
    budget: float = 1.0
    budget_bytes: int = 0
    seconds: float
    concurrency: int
    threads: int


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    neighbours = Neighbours()
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(dir=args.scratch) as scratch,
        Progress(console=Console(stderr=True), transient=True) as bar,
    ):
        grid = list(itertools.product(args.shapes, args.kinds, args.tenants))
        task = bar.add_task("density", total=len(grid) * (1 + len(args.budgets)))
        for shape, kind, tenants in grid:
            folder = _backbone(args, shape, Path(scratch))
            store = Path(scratch) / "store"
            cell = Cell(
                backbone=str(folder),
                store=str(store),
                shape=shape,
                kind=kind,
                tenants=tenants,
                seconds=args.seconds,
                concurrency=args.concurrency,
                threads=args.threads,
            )
            bar.update(task, description=f"{shape} {kind} x{tenants}: register")
            registered = _in_a_process_of_its_own(_register, cell)
            rows.append(registered)
            bar.advance(task)
            for budget in args.budgets:
                bar.update(task, description=f"{shape} {kind} x{tenants}: {budget:.0%} in memory")
                room = int(registered["module_bytes"] * budget)
                rows += _in_a_process_of_its_own(_serve, replace(cell, budget=budget, budget_bytes=room))
                bar.advance(task)
            shutil.rmtree(store)
    result = {
        "benchmark": "density",
        "machine": describe() | neighbours.report(),
        "commit": commit(),
        "config": {name: getattr(args, name) for name in ("seconds", "concurrency", "threads")},
        "rows": rows,
    }
    publish(result, args)


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
    parser.add_argument("--seconds", type=float, default=4.0, help="of each pattern, after a quarter of it unmeasured")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scratch", type=Path, help="where the stores are written (default: the system's folder)")
    return parser.parse_args(argv)


def _backbone(args: argparse.Namespace, shape: str, scratch: Path) -> Path:
    if shape in SHAPES:
        folder = scratch / shape
        return folder if folder.exists() else write_backbone(shape, folder, seed=0)
    if not (args.backbone / "config.json").exists():
        raise ConfigError(f"no backbone at {args.backbone}; run `make serve` once, or give --backbone FOLDER")
    return Path(args.backbone)


def _in_a_process_of_its_own(function: Callable[[Cell], Any], cell: Cell) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, cell).result()


# ---- registration --------------------------------------------------------------------------------------------------


def _register(cell: Cell) -> dict[str, Any]:
    """Seconds to add every tenant, against writing files of the same bytes, each flushed to the disk."""
    torch.set_num_threads(cell.threads)
    plain = Path(cell.store).with_name("plain")
    plain.mkdir()
    try:
        return uvloop.run(_add_all(cell, plain))
    finally:
        shutil.rmtree(plain)


async def _add_all(cell: Cell, plain: Path) -> dict[str, Any]:
    add_s = write_s = 0.0
    num_bytes = module_bytes = 0
    backbone = read_backbone(cell.backbone)
    arena = Arena(backbone.config, backbone.fingerprint, resolve_dtype("auto"), 0)
    async with Engine(EngineConfig(backbone=cell.backbone, store=cell.store, compute_threads=cell.threads)) as engine:
        files = _files(cell, backbone)
        while chunk := list(itertools.islice(files, _ADDED_AT_ONCE)):
            begin = time.perf_counter()
            await asyncio.gather(*(engine.add_tenant(tenant, data) for tenant, data in chunk))
            add_s += time.perf_counter() - begin
            begin = time.perf_counter()
            for tenant, data in chunk:
                _write(plain / tenant, data)
            write_s += time.perf_counter() - begin
            num_bytes += sum(len(data) for _, data in chunk)
            module_bytes += sum(arena.num_bytes(parse_header(data)) for _, data in chunk)
    return _case(cell) | {
        "system": "registration",
        "seconds": round(add_s, 3),
        "plain_write_s": round(write_s, 3),
        "bytes": num_bytes,
        "module_bytes": module_bytes,
        "tenants_per_s": round(cell.tenants / add_s, 1),
    }


def _files(cell: Cell, backbone: Backbone) -> Iterator[tuple[str, bytes]]:
    """Name and native file of every tenant, in bfloat16, made one at a time."""
    modules = KINDS[cell.kind](backbone, min(DISTINCT_MODULES, cell.tenants), seed=0)
    modules = [read_tenant_bytes(write_tenant(module, torch.bfloat16)) for module in modules]
    modules = [replace(module, self_tests=(_self_test(backbone, module),)) for module in modules]
    for i in range(cell.tenants):
        module = modules[i % len(modules)]
        yield _name(i), write_tenant(replace(module, source={**module.source, "tenant": str(i)}), torch.bfloat16)


def _self_test(backbone: Backbone, module: TenantModule) -> SelfTest:
    types = [0] * len(_SHORT_TEXT)
    expected = dense_forward(backbone, module, _SHORT_TEXT, types)
    return SelfTest(token_ids=torch.tensor(_SHORT_TEXT), type_ids=torch.tensor(types), expected=expected)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _name(i: int) -> str:
    return f"t{i:05}"


# ---- serving -------------------------------------------------------------------------------------------------------


def _serve(cell: Cell) -> list[dict[str, Any]]:
    torch.set_num_threads(cell.threads)
    return uvloop.run(_all_patterns(cell))


async def _all_patterns(cell: Cell) -> list[dict[str, Any]]:
    begin = time.perf_counter()
    engine = Engine(
        EngineConfig(
            backbone=cell.backbone,
            store=cell.store,
            compute_threads=cell.threads,
            module_budget_bytes=cell.budget_bytes,
            default_deadline_s=600.0,
        )
    )
    rows = []
    async with engine:
        start_s = time.perf_counter() - begin
        if cell.budget >= 1:  # all of them in memory and tested, as in a server that has run for a while
            await engine.prefetch(map(_name, range(cell.tenants)))
        for popularity in POPULARITY:
            tenants = _asked_for(popularity, cell.tenants)
            words = itertools.cycle(list(itertools.islice(texts(), 512)))
            await _closed_loop(engine, cell, tenants, words, cell.seconds / 4)
            seen = await _closed_loop(engine, cell, tenants, words, cell.seconds)
            row = _case(cell) | {"system": "vbert", "popularity": popularity, "budget": cell.budget}
            rows.append(row | seen | _memory(engine) | {"start_s": round(start_s, 3)})
    return rows


def _asked_for(popularity: str, tenants: int) -> Iterator[str]:
    """Names of the tenants of one request after the other."""
    rng = np.random.default_rng(0)
    if popularity == "distinct":
        yield from itertools.cycle(map(_name, range(tenants)))
    if popularity == "identical":
        yield from itertools.repeat(_name(0))
    weights = np.ones(tenants)
    if popularity == "zipf":
        weights = rng.permutation(np.arange(1, tenants + 1, dtype=np.float64) ** -ZIPF_EXPONENT)
    while True:
        for i in rng.choice(tenants, 1024, p=weights / weights.sum()):
            yield _name(int(i))


async def _closed_loop(
    engine: Engine, cell: Cell, tenants: Iterator[str], words: Iterator[str], seconds: float
) -> dict[str, Any]:
    """Clients that send their next request when the last was answered. A hit is a request that waited for no load."""
    hits: list[float] = []
    misses: list[float] = []
    loads: list[float] = []
    begin = time.perf_counter()

    async def client() -> None:
        while (sent := time.perf_counter()) < begin + seconds:
            result = await engine.embed(next(tenants), [next(words)])
            latency = time.perf_counter() - sent
            if load_s := result.timings.load_s:
                misses.append(latency)
                loads.append(load_s)
            else:
                hits.append(latency)

    await asyncio.gather(*(client() for _ in range(cell.concurrency)))
    elapsed = time.perf_counter() - begin
    every = hits + misses
    return {
        "requests_per_s": round(len(every) / elapsed, 1),
        "p50_ms": _ms(every, 50),
        "p99_ms": _ms(every, 99),
        "hit_rate": round(len(hits) / len(every), 4),
        "hit_p50_ms": _ms(hits, 50),
        "miss_p50_ms": _ms(misses, 50),
        "load_p50_ms": _ms(loads, 50),
        "answered": len(every),
    }


def _ms(values: Sequence[float], percent: int) -> float | None:
    return round(float(np.percentile(values, percent)) * 1e3, 3) if values else None


def _memory(engine: Engine) -> dict[str, Any]:
    """Bytes of resident modules, and MiB of this process: private memory, and pages of files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mib = {name: int(status[name].split()[0]) // 1024 for name in ("RssAnon", "RssFile")}
    return {
        "module_bytes": sum(engine.snapshot().resident_bytes.values()),
        "rss_anon_mib": mib["RssAnon"],
        "rss_file_mib": mib["RssFile"],
    }


def _case(cell: Cell) -> dict[str, Any]:
    return {"shape": cell.shape, "kind": cell.kind, "tenants": cell.tenants}


if __name__ == "__main__":
    main()
