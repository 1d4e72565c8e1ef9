"""What do skipped layers save? `vbert bench skip --data DIR [--json]`

Streams of real texts to one tenant with a LoRA in the upper half, under two names: one may use the sequence store, the
other may not. Both take turns in one engine, with the same texts, by one client and by 64:

- *unseen*: every text once;
- *own domain*: test texts, after the training texts were sent;
- *zipf*: the test texts drawn by Zipf's law (exponent 1), after 1,000 and after 20,000 such requests.

DIR has SET/train.jsonl.gz and SET/test.jsonl.gz with a "text" in each line.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import itertools
import json
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvloop
from rich.console import Console
from rich.progress import Progress

from benchmarks.density_cells import memory_mib, milliseconds
from benchmarks.machine import Neighbours, commit, describe
from benchmarks.ours import random_loras
from benchmarks.report import output_flags, publish
from benchmarks.serving import BACKBONE
from runtime import Engine, EngineConfig
from vbert.checkpoint import write_tenant
from vbert.errors import ConfigError, SelfTestFailed
from vbert.formats.transformers_folder import read_backbone

__all__ = ["main"]

SETS = ("banking77", "sst2", "ag_news")
SYSTEMS = ("plain", "sequence store")
TOLERANCE = 1e-3  # the two batch differently; of an L2-normalised embedding
_CHECKED = 64


@dataclass(slots=True)
class Seen:
    """What the clients of one system saw, over all turns."""

    latencies: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    hits: int = 0
    asked: int = 0

    def row(self) -> dict[str, Any]:
        """requests_per_s: median of the turns; spread: (p75 - p25) / p50 of them."""
        p25, p50, p75 = (float(q) for q in np.percentile(self.rates, (25, 50, 75)))
        return {
            "requests_per_s": round(p50, 1),
            "spread": round((p75 - p25) / p50, 4),
            "p50_ms": milliseconds(self.latencies, 50),
            "p99_ms": milliseconds(self.latencies, 99),
            "hit_rate": round(self.hits / self.asked, 4) if self.asked else 0.0,
            "answered": len(self.latencies),
        }


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    if not (args.backbone / "config.json").exists():
        raise ConfigError(f"no backbone at {args.backbone}; run `make serve` once, or give --backbone FOLDER")
    neighbours = Neighbours()
    rows = uvloop.run(_measure(args))
    names = ("rounds", "requests", "threads", "store_mib")
    result = {
        "benchmark": "skip",
        "machine": describe() | neighbours.report(),
        "commit": commit(),
        "config": {name: getattr(args, name) for name in names} | {"backbone": args.backbone.name},
        "rows": rows,
    }
    publish(result, args)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vbert bench skip", description=__doc__)
    output_flags(parser)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, default=BACKBONE, help="default: the one of `make serve`")
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--warm", type=int, nargs="+", default=[1_000, 20_000], help="requests before zipf is measured")
    parser.add_argument("--requests", type=int, default=256, help="of a turn; an eighth of it with one client")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store-mib", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(argv)


async def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("skip", total=len(args.sets) * (2 + len(args.warm)))
        for name in args.sets:
            train, test = (_texts(args.data / name / f"{part}.jsonl.gz") for part in ("train", "test"))
            rng = np.random.default_rng(0)
            zipf = _zipf(test, rng)
            streams: dict[str, tuple[Iterator[str], Iterator[str]]] = {
                "unseen": (iter(()), iter(test)),
                "own domain": (iter(train), iter(test)),
            }
            for stream, (before, measured) in streams.items():
                bar.update(task, description=f"{name}: {stream}")
                async with _engine(args) as engine:
                    await _send(engine, before)
                    rows += await _take_turns(engine, args, measured, {"set": name, "stream": stream})
                bar.advance(task)
            async with _engine(args) as engine:
                sent = 0
                for warm in args.warm:
                    bar.update(task, description=f"{name}: zipf after {warm}")
                    await _send(engine, itertools.islice(zipf, max(0, warm - sent)))
                    rows += await _take_turns(engine, args, zipf, {"set": name, "stream": f"zipf after {warm}"})
                    sent = warm
                    bar.advance(task)
    return rows


@asynccontextmanager
async def _engine(args: argparse.Namespace) -> AsyncIterator[Engine]:
    """With an empty sequence store, and the tenant under both names, each asked once."""
    backbone = read_backbone(args.backbone)
    (module,) = random_loras(backbone, 1, seed=0)
    half = backbone.config.num_layers // 2
    module = replace(module, deltas=tuple(delta for delta in module.deltas if delta.layer >= half))
    with tempfile.TemporaryDirectory() as store:
        config = EngineConfig(
            backbone=str(args.backbone),
            store=store,
            compute_threads=args.threads,
            sequence_store_bytes=args.store_mib * 2**20,
            sequence_sharing=("plain=off",),
            default_deadline_s=600.0,
        )
        async with Engine(config) as engine:
            for name in SYSTEMS:
                await engine.add_tenant(_tenant(name), write_tenant(module))
                await engine.embed(_tenant(name), ["a first request"])
            yield engine


def _tenant(system: str) -> str:
    return system.replace(" ", "-")


async def _send(engine: Engine, texts: Iterator[str]) -> None:
    """Requests that are not measured, to the tenant that may use the store."""

    async def client() -> None:
        for text in texts:
            await engine.embed(_tenant("sequence store"), [text], truncate=True)

    await asyncio.gather(*(client() for _ in range(64)))


async def _take_turns(
    engine: Engine, args: argparse.Namespace, texts: Iterator[str], case: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = []
    for clients in args.concurrency:
        seen = {name: Seen() for name in SYSTEMS}
        count = args.requests if clients > 1 else max(1, args.requests // 8)
        for done in range(args.rounds):
            work = list(itertools.islice(texts, count))
            if not work:
                break
            for name in SYSTEMS[done % 2 :] + SYSTEMS[: done % 2]:
                await _turn(engine, name, work, clients, seen[name])
            await _check(engine, work[: _CHECKED // args.rounds])
        rss = memory_mib()
        rows += [case | {"system": name, "concurrency": clients} | s.row() | rss for name, s in seen.items() if s.rates]
    return rows


async def _turn(engine: Engine, system: str, work: Sequence[str], clients: int, seen: Seen) -> None:
    before = engine.snapshot().sequences
    todo = iter(work)
    begin = time.perf_counter()

    async def client() -> None:
        for text in todo:
            sent = time.perf_counter()
            await engine.embed(_tenant(system), [text], truncate=True)
            seen.latencies.append(time.perf_counter() - sent)

    await asyncio.gather(*(client() for _ in range(clients)))
    seen.rates.append(len(work) / (time.perf_counter() - begin))
    after = engine.snapshot().sequences
    seen.hits += sum(after[event] - before[event] for event in ("hits", "shared"))
    seen.asked += sum(after[event] - before[event] for event in ("hits", "shared", "misses"))


async def _check(engine: Engine, work: Sequence[str]) -> None:
    """Both answer alike, the one from the store by now."""
    plain, stored = [(await engine.embed(_tenant(name), work, truncate=True)).embeddings for name in SYSTEMS]
    if not (worst := float(np.abs(plain - stored).max())) <= TOLERANCE:
        raise SelfTestFailed(f"an answer with the sequence store differs by {worst:.3g}")


def _zipf(texts: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    weights = rng.permutation(1.0 / np.arange(1, len(texts) + 1))
    while True:
        for i in rng.choice(len(texts), 1024, p=weights / weights.sum()):
            yield texts[int(i)]


def _texts(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


if __name__ == "__main__":
    main()
