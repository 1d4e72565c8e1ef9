"""What do skipped layers save? `vbert bench skip --data DIR [--skip NAME=FOLDER ...] [--ngrams NAME=FILE ...]`

Streams of real texts to one tenant with a LoRA in the upper half, by every way through the lower half, each in an
engine of its own, with the same texts in turns, by one client and by 64:

- *unseen*: every text once;
- *own domain*: test texts, after --own training texts were sent; n-gram tables have all training texts as well;
- *zipf*: the test texts drawn by Zipf's law (exponent 1), after 1,000 and after 20,000 such requests;
- *warm*: --own test texts over and over, after each was sent twice: all is stored.

DIR has SET/train.jsonl.gz and SET/test.jsonl.gz with a "text" in each line. Each FOLDER is a skip backbone (`vbert
distill`), the first one with a plain way, FILE a table of it (`vbert ngrams build`); without them the sequence store is
measured alone. --exits SET=FILE gives a classifier with early exits of that set (`vbert train --exits`), which is
measured next to itself without them. *plain again*: a second engine of the plain way, which tells how much is noise.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvloop
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from benchmarks.density_cells import memory_mib, milliseconds
from benchmarks.machine import Neighbours, commit, describe
from benchmarks.ours import random_loras
from benchmarks.report import output_flags, publish
from benchmarks.serving import BACKBONE
from benchmarks.skip_streams import STREAMS, stream_of
from runtime import Engine, EngineConfig
from runtime.metrics import MetricsSnapshot
from runtime.request import ClassifyResult, EmbedResult
from vbert.checkpoint import write_tenant
from vbert.encoder import Encoder
from vbert.errors import ConfigError, SelfTestFailed
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.local_layers import LocalLayers
from vbert.model import resolve_dtype
from vbert.ngram.counting import NgramCounts
from vbert.tables import build_table, count_texts
from vbert.tenant import TenantModule
from vbert.tokenizer import Tokenizer

__all__ = ["main"]

SETS = ("banking77", "sst2", "ag_news")
TOLERANCE = 1e-3  # of an L2-normalised embedding: two engines batch differently
HALF_TOLERANCE = 2e-2  # where rows are stored as float16, or all is computed in bfloat16
_CHECKED = 64
_ONE_CLIENT = 16  # requests of a turn of one client: the first of them finds its weights out of the caches


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One way through the layers. path: what requests ask for. paths: what its tenant was trained for. skip: the skip
    backbone, "" for the first. on_disk: an eighth of the sequence store lies in memory, all of it fits a file. same_as:
    the system that gives the same answers. base: the one it is compared with. classifies: its tenant is the classifier
    of the set; exits: which may leave early."""

    name: str
    path: str = "plain"
    paths: tuple[str, ...] = ("plain",)
    sequences: bool = False
    on_disk: bool = False
    ngrams: bool = False
    skip: str = ""
    same_as: str = ""
    base: str = "plain"
    classifies: bool = False
    exits: bool = False

    @property
    def keeps(self) -> bool:
        """Whether what was sent before changes how fast it is."""
        return self.sequences or self.ngrams


PLAIN = System(name="plain")
AGAIN = System(name="plain again")  # how much is noise
STORED = (
    System(name="sequence store", sequences=True, same_as="plain"),
    System(name="store on disk", sequences=True, on_disk=True, same_as="plain"),
)
SKIPPING = (
    System(name="compute", path="compute", paths=("exact",)),
    System(name="exact", path="exact", paths=("exact",), ngrams=True, same_as="compute"),
    System(name="backoff", path="backoff", paths=("backoff",), ngrams=True),
    System(name="auto: plain, exact", path="auto", paths=("plain", "exact"), ngrams=True),
    System(name="auto: all", path="auto", paths=("plain", "exact", "backoff"), ngrams=True, sequences=True),
)
EXITING = (
    System(name="classifier", classifies=True),
    System(name="early exit", classifies=True, exits=True, base="classifier"),
)


def systems_of(args: argparse.Namespace, data: str) -> list[System]:
    """Those that a set of texts is sent to."""
    every = [PLAIN, AGAIN, *STORED, *(SKIPPING if args.skip else ())]
    for name in list(args.skip)[1:]:
        for system in SKIPPING[:3]:
            same_as = system.same_as and f"{name}: {system.same_as}"
            every.append(replace(system, name=f"{name}: {system.name}", skip=name, same_as=same_as))
    every += EXITING if data in args.exits else ()
    wanted = {"plain", *args.systems}
    return [system for system in every if not args.systems or {system.name, system.base} <= wanted]


@dataclass(slots=True)
class Seen:
    """What the clients of one system saw, over all turns."""

    latencies: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    hits: int = 0
    asked: int = 0
    paths: Counter[str] = field(default_factory=Counter)
    left: int = 0

    def row(self, base: Seen) -> dict[str, Any]:
        """requests_per_s: median of the turns; spread: (p75 - p25) / p50 of them. to_base: median and quartiles of its
        rate as a multiple of that of the base in the same round. hit_rate: of texts in the sequence store, else of
        tokens whose tri-gram was stored. paths: share of the texts that took each; left: early."""
        p25, p50, p75 = (float(q) for q in np.percentile(self.rates, (25, 50, 75)))
        ratios = np.percentile(np.array(self.rates) / np.array(base.rates), (50, 25, 75))
        total = max(1, self.paths.total())
        return {
            "requests_per_s": round(p50, 1),
            "spread": round((p75 - p25) / p50, 4),
            "to_base": [round(float(ratio), 4) for ratio in ratios],
            "p50_ms": milliseconds(self.latencies, 50),
            "p99_ms": milliseconds(self.latencies, 99),
            "hit_rate": round(self.hits / self.asked, 4) if self.asked else 0.0,
            "paths": {path: round(count / total, 4) for path, count in sorted(self.paths.items())},
            "left": round(self.left / max(1, len(self.latencies)), 4),
            "answered": len(self.latencies),
        }


class Served:
    """An engine with one tenant, and what it was asked so far."""

    def __init__(self, system: System, engine: Engine) -> None:
        self.system, self.engine, self.seen = system, engine, Seen()

    async def ask(self, texts: Sequence[str]) -> EmbedResult | ClassifyResult:
        if self.system.classifies:
            above = None if self.system.exits else 1.0
            return await self.engine.classify("tenant", texts, truncate=True, exit_threshold=above)
        return await self.engine.embed("tenant", texts, truncate=True, path=self.system.path)

    async def send(self, texts: Iterator[str]) -> None:
        """Requests that are not measured."""

        async def client() -> None:
            for text in texts:
                await self.ask([text])

        await asyncio.gather(*(client() for _ in range(64)))

    async def turn(self, work: Sequence[str], clients: int) -> None:
        before = self.engine.snapshot()
        todo = iter(work)
        begin = time.perf_counter()

        async def client() -> None:
            for text in todo:
                sent = time.perf_counter()
                answer = await self.ask([text])
                self.seen.latencies.append(time.perf_counter() - sent)
                self.seen.paths.update(answer.paths)
                if isinstance(answer, ClassifyResult):
                    self.seen.left += answer.exits[0] is not None

        await asyncio.gather(*(client() for _ in range(clients)))
        self.seen.rates.append(len(work) / (time.perf_counter() - begin))
        self._count(before, self.engine.snapshot())

    async def settle(self) -> None:
        """Until nothing is computed for later any more, which would slow whoever comes next."""
        if not self.system.ngrams or self.system.path not in ("backoff", "auto"):
            return
        before = -1
        while (now := self.engine.snapshot().ngrams["computed"]) != before:
            before = now
            await asyncio.sleep(0.2)

    def kept_mib(self) -> float:
        """What its stores hold in memory."""
        held = self.engine.snapshot().memory_bytes
        return round((held.get("sequences", 0) + held.get("ngrams", 0)) / 2**20, 1)

    def _count(self, before: MetricsSnapshot, after: MetricsSnapshot) -> None:
        if self.system.sequences:
            grown = {event: after.sequences[event] - before.sequences[event] for event in after.sequences}
            self.seen.hits += grown["hits"] + grown["shared"]
            self.seen.asked += grown["hits"] + grown["shared"] + grown["misses"]
        elif self.system.ngrams:
            self.seen.hits += after.ngrams["trigrams"] - before.ngrams["trigrams"]
            self.seen.asked += after.tokens - before.tokens


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    if not args.skip and not (args.backbone / "config.json").exists():
        raise ConfigError(f"no backbone at {args.backbone}; run `make serve` once, or give --backbone FOLDER")
    neighbours = Neighbours()
    rows = uvloop.run(_measure(args))
    names = ("rounds", "requests", "threads", "store_mib", "own", "systems", "streams")
    result = {
        "benchmark": "skip",
        "machine": describe() | neighbours.report(),
        "commit": commit(),
        "config": {name: getattr(args, name) for name in names}
        | {"dtype": str(resolve_dtype(args.dtype)).removeprefix("torch.")}
        | {"backbone": next(iter(args.skip.values()), args.backbone).name, "skips": list(args.skip)},
        "rows": rows,
    }
    publish(result, args)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vbert bench skip", description=__doc__)
    output_flags(parser)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, default=BACKBONE, help="default: the one of `make serve`")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME=FOLDER", help="in place of --backbone")
    parser.add_argument("--ngrams", nargs="+", default=[], metavar="NAME=FILE", help="tables of these")
    parser.add_argument("--exits", nargs="+", default=[], metavar="SET=FILE", help="classifiers with early exits")
    parser.add_argument("--systems", nargs="+", default=[], metavar="NAME", help="measure these and plain; none: all")
    parser.add_argument("--streams", nargs="+", default=list(STREAMS), choices=STREAMS)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--warm", type=int, nargs="+", default=[1_000, 20_000], help="requests before zipf is measured")
    parser.add_argument("--own", type=int, default=1_000, help="requests before own domain is measured")
    parser.add_argument("--requests", type=int, default=256, help="of a round; with one client a quarter")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store-mib", type=int, default=256, help="of the sequence store, and of the n-gram cache")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    args = parser.parse_args(argv)
    for option in ("skip", "ngrams", "exits"):
        setattr(args, option, _named(option, getattr(args, option)))
    return args


def _named(option: str, items: Sequence[str]) -> dict[str, Path]:
    pairs = [item.partition("=") for item in items]
    if bad := [item for item, (_, equals, _) in zip(items, pairs, strict=True) if not equals]:
        raise ConfigError(f"{option} has {bad[0]!r}; write NAME=PATH")
    return {name: Path(path) for name, _, path in pairs}


async def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("skip", total=len(args.sets) * len(args.streams))
        for name, kind in itertools.product(args.sets, args.streams):
            bar.update(task, description=f"{name}: {kind}")
            stream = stream_of(kind, args.data / name, args.own)
            async with _serving(args, name, stream.own) as every:
                sent = 0
                for warm in args.warm if kind == "zipf" else [0]:
                    before = list(itertools.islice(stream.texts, max(0, warm - sent))) if warm else stream.first
                    for served in every:
                        if served.system.keeps:
                            await served.send(iter(before))
                            await served.settle()
                    case = {"set": name, "stream": f"zipf after {warm}" if warm else kind}
                    rows += await _take_turns(every, args, stream.texts, case)
                    sent = warm
            bar.advance(task)
    return rows


@asynccontextmanager
async def _serving(args: argparse.Namespace, data: str, own: Sequence[str]) -> AsyncIterator[list[Served]]:
    """An engine for each system of a set, with nothing stored but tables, and its tenant, asked once. own: texts whose
    n-grams have a table too."""
    folders = args.skip or {"": args.backbone}
    first = next(iter(folders))
    backbones = {name: read_backbone(folder) for name, folder in folders.items()}
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        every_table = {name: [str(args.ngrams[name])] if name in args.ngrams else [] for name in folders}
        if own and args.skip:
            for name, tables in every_table.items():
                tables.insert(0, _own_table(backbones[name], own, scratch / f"own-{name}.ngrams"))
        every: list[Served] = []
        for system in systems_of(args, data):
            name = system.skip or first
            backbone, tables, store_bytes = backbones[name], every_table[name], args.store_mib * 2**20
            config = EngineConfig(
                backbone=str(folders[name]),
                store=str(scratch / f"store-{len(every)}"),
                compute_threads=args.threads,
                dtype=args.dtype,
                sequence_store_bytes=store_bytes // 8 if system.on_disk else store_bytes * system.sequences,
                sequence_disk_bytes=store_bytes * system.on_disk,
                ngrams=tuple(tables) if system.ngrams else (),
                ngram_cache_bytes=store_bytes * system.ngrams,
                profile=str(scratch) if system.path == "auto" else "",
                default_deadline_s=600.0,
            )
            engine = await stack.enter_async_context(Engine(config))
            module = args.exits[data] if system.classifies else write_tenant(_module(backbone, system.paths))
            await engine.add_tenant("tenant", module)
            every.append(Served(system, engine))
            await every[-1].ask(["a first request"])
        yield every


def _module(backbone: Backbone, paths: tuple[str, ...]) -> TenantModule:
    """A random LoRA above the skipped layers."""
    (module,) = random_loras(backbone, 1, seed=0)
    skip = backbone.skip
    first = skip.config.first_layer if skip is not None else backbone.config.num_layers // 2
    module = replace(module, deltas=tuple(delta for delta in module.deltas if delta.layer >= first), paths=paths)
    if skip is None or paths == ("plain",):
        return module
    fingerprint = backbone.fingerprint if "plain" in paths else skip.fingerprint
    return replace(module, skip_fingerprint=skip.fingerprint, backbone_fingerprint=fingerprint)


def _own_table(backbone: Backbone, texts: Sequence[str], path: Path) -> str:
    assert backbone.skip is not None
    device = torch.device("cpu")
    local = LocalLayers(Encoder(backbone.config, backbone.weights, resolve_dtype("auto"), device), backbone.skip)
    counts = NgramCounts()
    count_texts(texts, Tokenizer.load(backbone.folder, backbone.config), counts)
    build_table(path, local, counts, min_count=1)
    return str(path)


async def _take_turns(
    every: list[Served], args: argparse.Namespace, texts: Iterator[str], case: dict[str, Any]
) -> list[dict[str, Any]]:
    rows, turns = [], random.Random(0)
    for clients in args.concurrency:
        for served in every:
            served.seen = Seen()
        count, rounds = args.requests, args.rounds
        if clients == 1:  # short turns, so that the systems are compared in the same moment
            count, rounds = _ONE_CLIENT, max(1, args.requests // (4 * _ONE_CLIENT)) * args.rounds
        for done in range(rounds):
            work = list(itertools.islice(texts, count))
            if not work:
                break
            for served in turns.sample(every, len(every)):  # the one before leaves its weights in the caches
                await served.turn(work, clients)
                await served.settle()
            if done % (rounds // args.rounds) == 0:
                await _check(every, work[: _CHECKED // args.rounds])
        shown = [served for served in every if served.seen.rates]
        seen = {served.system.name: served.seen for served in shown}
        for served in shown:
            who = {"system": served.system.name, "base": served.system.base, "concurrency": clients}
            measured = served.seen.row(seen[served.system.base])
            rows.append(case | who | measured | {"kept_mib": served.kept_mib()} | memory_mib())
    return rows


async def _check(every: Sequence[Served], work: Sequence[str]) -> None:
    """Those that should answer alike do."""
    alike = [served for served in every if not served.system.classifies]
    answers = {served.system.name: _embeddings(await served.ask(work)) for served in alike}
    for served in alike:
        system = served.system
        if system.same_as in answers:
            whole = not system.ngrams and served.engine.dtype == "float32"
            tolerance = TOLERANCE if whole else HALF_TOLERANCE
            worst = float(np.abs(answers[system.name] - answers[system.same_as]).max())
            if not worst <= tolerance:
                raise SelfTestFailed(f"an answer of {system.name} differs from {system.same_as} by {worst:.3g}")


def _embeddings(answer: EmbedResult | ClassifyResult) -> NDArray[np.float32]:
    assert isinstance(answer, EmbedResult)
    return answer.embeddings


if __name__ == "__main__":
    main()
