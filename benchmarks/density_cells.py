"""The work of `vbert bench density`: one store, registered and served, each in a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import uvloop
from numpy.typing import NDArray

from benchmarks.ours import mixed_modules, random_adapters, random_loras
from benchmarks.serving import texts
from runtime import Engine, EngineConfig
from vbert.arena import Arena
from vbert.checkpoint import read_tenant_bytes, write_tenant
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.header import parse_header
from vbert.model import resolve_dtype
from vbert.reference import dense_forward
from vbert.tenant import SelfTest, TenantModule

__all__ = [
    "KINDS",
    "POPULARITY",
    "Cell",
    "Serving",
    "asked_for",
    "first_answers",
    "memory_mib",
    "milliseconds",
    "register",
]

KINDS: dict[str, Callable[..., list[TenantModule]]] = {
    "lora": random_loras,
    "adapter": random_adapters,
    "mix": mixed_modules,
}
POPULARITY = ("distinct", "uniform", "zipf", "identical")
ZIPF_EXPONENT = 1.1
DISTINCT_MODULES = 16
_ADDED_AT_ONCE = 64
_SHORT_TEXT = [101, 2023, 2003, 1037, 3231, 102]  # of the self-test every module carries
_COLD_SAMPLES = 100
_UNMEASURED = 256  # requests of each pattern before it is measured, or as many as there are tenants if that is more,
_UNMEASURED_S = 6.0  # but not longer than this


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One store and the room it gets: `budget` is the share of all modules' bytes that fit in memory, or a size."""

    backbone: str
    store: str
    shape: str
    kind: str
    tenants: int
    budget: float | str = 1.0
    budget_bytes: int = 0
    first_round: int
    """Tenants asked once before anything is measured, the most popular first."""
    seconds: float
    concurrency: int
    threads: int


# ---- registration --------------------------------------------------------------------------------------------------


def register(cell: Cell) -> dict[str, Any]:
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
    num_bytes = 0
    sizes: list[int] = []
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
            for tenant, _ in chunk:
                (plain / tenant).unlink()  # twice the store may be more than the disk holds
            num_bytes += sum(len(data) for _, data in chunk)
            sizes += [arena.num_bytes(parse_header(data)) for _, data in chunk]
    return _case(cell) | {
        "system": "registration",
        "seconds": round(add_s, 3),
        "plain_write_s": round(write_s, 3),
        "bytes": num_bytes,
        "module_bytes": sum(sizes),
        "largest_module_bytes": max(sizes),
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


class Serving:
    """An engine in a process of its own, which answers when it is its turn: engines that are compared take turns, so
    that a disturbance meets them alike."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Self:
        self.rows = [self._pool.submit(_start, self._cell).result()]
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.submit(_stop).result()
        self._pool.shutdown()

    def prepare(self, popularity: str) -> None:
        self._seen = Seen()
        self._pool.submit(_ask_unmeasured, self._cell, popularity).result()

    def turn(self) -> None:
        self._seen.add(self._pool.submit(_ask, self._cell).result())

    def finish(self, popularity: str) -> None:
        memory = self._pool.submit(_memory).result()
        self.rows.append(self.rows[0] | {"popularity": popularity} | self._seen.row() | memory)


@dataclass(slots=True)
class Seen:
    """What clients saw. A hit is a request that waited for no load."""

    hits: list[float] = field(default_factory=list)
    misses: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        self.hits += other.hits
        self.misses += other.misses
        self.loads += other.loads
        self.rates += other.rates

    def row(self) -> dict[str, Any]:
        """requests_per_s: median of the turns; spread: (p75 - p25) / p50 of them."""
        every = self.hits + self.misses
        p25, p50, p75 = (float(q) for q in np.percentile(self.rates, (25, 50, 75)))
        return {
            "requests_per_s": round(p50, 1),
            "spread": round((p75 - p25) / p50, 4),
            "p50_ms": milliseconds(every, 50),
            "p99_ms": milliseconds(every, 99),
            "hit_rate": round(len(self.hits) / len(every), 4),
            "hit_p50_ms": milliseconds(self.hits, 50),
            "miss_p50_ms": milliseconds(self.misses, 50),
            "load_p50_ms": milliseconds(self.loads, 50),
            "answered": len(every),
        }


class _Mine:
    """Of the process that serves."""

    runner: asyncio.Runner
    engine: Engine
    tenants: Iterator[str]
    words: Iterator[str]


def _start(cell: Cell) -> dict[str, Any]:
    """Ready to serve, and the tenants of the first round were asked once: from then on they are tested, as in a server
    that has run for a while."""
    torch.set_num_threads(cell.threads)
    begin = time.perf_counter()
    _Mine.engine = Engine(
        EngineConfig(
            backbone=cell.backbone,
            store=cell.store,
            compute_threads=cell.threads,
            module_budget_bytes=cell.budget_bytes,
            default_deadline_s=600.0,
        )
    )
    _Mine.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    _Mine.runner.run(_Mine.engine.start())
    start_s = round(time.perf_counter() - begin, 3)
    _Mine.tenants = map(_name, _most_popular_first(cell.tenants)[: cell.first_round])
    _Mine.words = itertools.cycle(list(itertools.islice(texts(), 512)))
    facts = _case(cell) | {"system": "vbert", "budget": cell.budget, "start_s": start_s, "popularity": "first round"}
    facts |= {"first_round": min(cell.first_round, cell.tenants)}
    return facts | _Mine.runner.run(_closed_loop(cell.concurrency, _Mine.tenants, math.inf)).row() | _memory()


def _ask_unmeasured(cell: Cell, popularity: str) -> None:
    _Mine.tenants = asked_for(popularity, cell.tenants)
    first = itertools.islice(_Mine.tenants, max(_UNMEASURED, cell.tenants))
    _Mine.runner.run(_closed_loop(cell.concurrency, first, _UNMEASURED_S))


def _ask(cell: Cell) -> Seen:
    return _Mine.runner.run(_closed_loop(cell.concurrency, _Mine.tenants, cell.seconds))


def _stop() -> None:
    _Mine.runner.run(_Mine.engine.stop())
    _Mine.runner.close()


def asked_for(popularity: str, tenants: int) -> Iterator[str]:
    """Names of the tenants of one request after the other."""
    rng = np.random.default_rng(0)
    if popularity == "distinct":
        yield from itertools.cycle(map(_name, range(tenants)))
    if popularity == "identical":
        yield from itertools.repeat(_name(0))
    weights = _zipf(tenants) if popularity == "zipf" else np.ones(tenants)
    while True:
        for i in rng.choice(tenants, 1024, p=weights / weights.sum()):
            yield _name(int(i))


def _zipf(tenants: int) -> NDArray[np.float64]:
    """Relative popularity of each tenant."""
    return np.random.default_rng(1).permutation(np.arange(1, tenants + 1, dtype=np.float64) ** -ZIPF_EXPONENT)


def _most_popular_first(tenants: int) -> list[int]:
    return [int(i) for i in np.argsort(-_zipf(tenants))]


async def _closed_loop(clients: int, tenants: Iterator[str], seconds: float) -> Seen:
    """Clients that send their next request when the last was answered, until the time is up or the tenants end."""
    seen = Seen()
    begin = time.perf_counter()

    async def client() -> None:
        while (sent := time.perf_counter()) < begin + seconds and (tenant := next(tenants, None)) is not None:
            result = await _Mine.engine.embed(tenant, [next(_Mine.words)])
            latency = time.perf_counter() - sent
            if load_s := result.timings.load_s:
                seen.misses.append(latency)
                seen.loads.append(load_s)
            else:
                seen.hits.append(latency)

    await asyncio.gather(*(client() for _ in range(clients)))
    seen.rates.append((len(seen.hits) + len(seen.misses)) / (time.perf_counter() - begin))
    return seen


# ---- one request at a time -----------------------------------------------------------------------------------------


def first_answers(cell: Cell) -> list[dict[str, Any]]:
    """Latency of one request at a time: of tenants in memory, and of tenants asked for the first time."""
    torch.set_num_threads(cell.threads)
    return uvloop.run(_first_answers(cell))


async def _first_answers(cell: Cell) -> list[dict[str, Any]]:
    """Three ways in turn, so that a disturbance meets them alike; each cold request runs the tenant's self-test."""
    config = EngineConfig(backbone=cell.backbone, store=cell.store, compute_threads=cell.threads)
    seconds: dict[str, list[float]] = {"in memory": [], "page cache": [], "disk": []}
    names = map(_name, range(1, cell.tenants))
    words = itertools.cycle(list(itertools.islice(texts(), 64)))
    async with Engine(config) as engine:
        for _ in range(20):
            await engine.embed(_name(0), [next(words)])
        for _ in range(min(_COLD_SAMPLES, (cell.tenants - 1) // 2)):
            for way, name in (("in memory", _name(0)), ("page cache", next(names)), ("disk", next(names))):
                await _place(engine, cell, name, way)
                text = next(words)
                begin = time.perf_counter()
                await engine.embed(name, [text])
                seconds[way].append(time.perf_counter() - begin)
    return [
        _case(cell)
        | {"system": "vbert, one at a time", "where": way, "answered": len(values)}
        | {"p50_ms": milliseconds(values, 50), "p99_ms": milliseconds(values, 99)}
        for way, values in seconds.items()
    ]


async def _place(engine: Engine, cell: Cell, name: str, way: str) -> None:
    """Bring a tenant's file into the page cache, or out of it."""
    digest = (await engine.get_tenant(name)).digest
    path = Path(cell.store) / "blobs" / digest[:2] / f"{digest}.safetensors"
    if way == "page cache":
        path.read_bytes()
    if way == "disk":
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def milliseconds(values: Sequence[float], percent: int) -> float | None:
    return round(float(np.percentile(values, percent)) * 1e3, 3) if values else None


def _memory() -> dict[str, Any]:
    return {"module_bytes": sum(_Mine.engine.snapshot().resident_bytes.values())} | memory_mib()


def memory_mib() -> dict[str, int]:
    """MiB of this process: private memory, and pages of files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(status[field].split()[0]) // 1024
        for name, field in (("rss_anon_mib", "RssAnon"), ("rss_file_mib", "RssFile"))
    }


def _case(cell: Cell) -> dict[str, Any]:
    return {"shape": cell.shape, "kind": cell.kind, "tenants": cell.tenants}
