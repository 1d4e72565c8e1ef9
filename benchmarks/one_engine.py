"""An engine in a process of its own, under load for as long as it is told: `python -m benchmarks.one_engine`.

What decides about threads (OMP_WAIT_POLICY) is read once, when torch is loaded, so every setting needs its own process.
It is told one line `CLIENTS SECONDS` at a time and answers with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import uvloop

from benchmarks.ours import random_loras
from benchmarks.peers import adapter_name
from benchmarks.workload import make_requests
from runtime import Engine, EngineConfig
from runtime.lanes import use_one_heap
from vbert.checkpoint import write_tenant
from vbert.formats.transformers_folder import Backbone, read_backbone

__all__ = ["run"]

_Work = Iterator[tuple[str, list[int]]]  # (tenant, token ids) of one request after the other


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True, help="as EngineConfig.compute_threads")
    parser.add_argument("--tenants", type=int, required=True)
    args = parser.parse_args()
    use_one_heap()  # as `vbert serve` does
    uvloop.run(_serve(args))


async def _serve(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as store:
        backbone = read_backbone(args.backbone)
        config = EngineConfig(backbone=str(args.backbone), store=store, compute_threads=args.threads)
        async with Engine(config) as engine:
            work = await _prepare(engine, backbone, args)
            _tell(ready=True)
            while line := await asyncio.to_thread(sys.stdin.readline):
                clients, seconds = line.split()
                latencies, elapsed_s = await _closed_loop(engine, work, int(clients), float(seconds))
                _tell(latencies_s=latencies, elapsed_s=elapsed_s, threads=engine.snapshot().compute_threads)


async def _prepare(engine: Engine, backbone: Backbone, args: argparse.Namespace) -> _Work:
    """Each tenant is added and asked once: its first load compares it with the dense reference."""
    for t, module in enumerate(random_loras(backbone, args.tenants, seed=0)):
        await engine.add_tenant(adapter_name(t), write_tenant(module))
    requests = make_requests(256, args.tenants, "equal", vocab_size=backbone.config.vocab_size, seed=0)
    work = [(adapter_name(t), list(ids)) for ids, t in zip(requests.token_ids, requests.tenants, strict=True)]
    for tenant, token_ids in work:
        await engine.embed(tenant, [token_ids])
    return itertools.cycle(work)


async def _closed_loop(engine: Engine, work: _Work, clients: int, seconds: float) -> tuple[list[float], float]:
    """Clients that send their next request when the last was answered. Returns latencies, and the time it took."""
    latencies: list[float] = []
    begin = time.perf_counter()

    async def client() -> None:
        while (sent := time.perf_counter()) < begin + seconds:
            tenant, token_ids = next(work)
            await engine.embed(tenant, [token_ids])
            latencies.append(time.perf_counter() - sent)

    await asyncio.gather(*(client() for _ in range(clients)))
    return latencies, time.perf_counter() - begin


def _tell(**answer: object) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    run()
