"""What do look-ups and uploads cost a batch, and how much of it do the lanes hide? `vbert bench overlap [--json]`

The same batches with everything at hand (none), with word rows from a mapped table (look-up), with modules that come to
the device when they are needed (upload), and with both; the lanes on, and off. Tenants are drawn by Zipf's law, and
the device has room for a share of them. Driven without an engine: no queue, no event loop, two batches in flight.
Hidden is the share of what the rows and module lanes did for which compute did not wait, by the trace of those rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import Neighbours, commit, describe
from benchmarks.ours import load, random_adapters, random_loras
from benchmarks.report import output_flags, publish
from benchmarks.timing import Timing, interleave
from benchmarks.workload import ALL_SHAPES, LENGTHS, make_requests, write_backbone
from runtime.clock import MonotonicClock
from runtime.forwards import Forwards
from runtime.launch import Computed, Launch
from runtime.streams import open_device
from runtime.threads import ThreadChoice
from runtime.trace import LANES, Trace
from runtime.uploads import Arrival, Uploads, module_pieces
from tests.tolerances import assert_answer
from training.progress import Progress, progress_bar
from vbert.arena import Arena, ResidentTenant, slot_bytes
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.memory import Slabs
from vbert.model import Model, SequenceInput
from vbert.rows import MappedRows, publish_rows

__all__ = ["main"]

KINDS = {"lora": random_loras, "adapter": random_adapters}
CASES = {"none": (False, False), "look-up": (True, False), "upload": (False, True), "both": (True, True)}
ZIPF_EXPONENT = 1.1
DISTINCT_MODULES = 64
_MOST_PINNED = 8 * 2**20  # bytes of one module
_DEPTH = 2  # batches in flight with the lanes on
_WARMUP = 2  # rounds that are not timed


@dataclass(frozen=True, slots=True)
class Work:
    """The batches that every system computes. tenants[k][i] is who sequence i of batch k is for; tenant t has the
    module t modulo the number of modules, but slots and uploads of its own."""

    backbone: Backbone
    kind: str
    modules: Sequence[ResidentTenant]  # in host memory
    token_ids: Sequence[Sequence[int]]
    tenants: Sequence[Sequence[int]]
    words: MappedRows

    def module(self, tenant: int) -> ResidentTenant:
        return self.modules[tenant % len(self.modules)]

    def sequences(self, k: int, resident: dict[int, ResidentTenant]) -> list[SequenceInput]:
        pairs = zip(self.token_ids, self.tenants[k], strict=True)
        return [SequenceInput(ids, [0] * len(ids), resident[t]) for ids, t in pairs]


class System:
    """One setting: whether rows are looked up, whether modules are uploaded into `num_slots`, whether lanes are on."""

    def __init__(
        self, work: Work, case: str, *, lanes: bool, num_slots: int, scratch: Path, args: argparse.Namespace
    ) -> None:
        look_up, upload = CASES[case]
        self._work, self._lanes = work, lanes
        model = Model.load(work.backbone, args.dtype, args.device, work.words if look_up else None)
        self._device = open_device(model.device, clock := MonotonicClock())
        self._stack = ExitStack()
        self._stack.callback(self._device.close)
        self._trace_file = Path(args.trace if args.trace and lanes and case == "both" else scratch / f"{case}{lanes}")
        self._trace = trace = Trace(self._trace_file, self._device)
        self._stack.callback(trace.close)
        compute, rows, results = (self._stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3))
        self._uploads = Uploads(self._device, overlapped=lanes, trace=trace)
        self._forwards = Forwards(
            model,
            self._device,
            compute,
            clock=clock,
            threads=ThreadChoice((args.threads,)),
            rows=rows if lanes else None,
            results=results,
            overlapped=lanes,
            source=work.words if look_up else None,
            arriving=lambda tenant: self._arrivals.get(tenant.digest),
            trace=trace,
        )
        everyone = sorted({tenant for batch in work.tenants for tenant in batch})
        layout = next(iter(work.modules[0].header.layouts.values()))
        num_slots = num_slots if upload else len(everyone)
        room = num_slots * slot_bytes(layout, model.dtype)
        memory = Slabs(self._device.empty(room + room // 4 + 2**22)) if model.device.type == "cuda" else None
        self._arena = Arena(work.backbone.config, work.backbone.fingerprint, model.dtype, room, memory=memory)
        self._resident: OrderedDict[int, ResidentTenant] = OrderedDict()  # least recently used first
        self._arrivals: dict[str, Arrival] = {}
        self._in_flight: deque[tuple[set[int], Future[Computed]]] = deque()
        self.num_uploads = self.upload_bytes = 0
        for tenant in everyone if not upload else ():
            self._bring(tenant)
        self.first = self._run(1)[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self) -> None:
        self._run(len(self._work.tenants))

    def seconds(self) -> dict[str, float]:
        """By what was done: `batch` (rows gathered), `module` (sent), `wait` (by compute)."""
        self._trace.flush()
        total = {"batch": 0.0, "module": 0.0, "wait": 0.0}
        for span in json.loads(self._trace_file.read_text()):
            name = span["name"].split()[0]
            if span["ph"] == "X" and (name != "batch" or LANES[span["tid"]] == "rows"):
                total[name] += span["dur"] / 1e6
        return total

    def _run(self, num_batches: int) -> list[list[Tensor]]:
        """Answers of the first batches of the work."""
        answers: list[list[Tensor]] = []
        for k in range(num_batches):
            while len(self._in_flight) >= (_DEPTH if self._lanes else 1):
                answers.append(self._finish())
            wanted = set(self._work.tenants[k])
            for tenant in wanted:
                self._bring(tenant, keep=wanted)
            launch = Launch(k, self._work.sequences(k, self._resident))
            self._in_flight.append((wanted, self._forwards.submit(launch)))
        while self._in_flight:
            answers.append(self._finish())
        return answers

    def _finish(self) -> list[Tensor]:
        _, future = self._in_flight.popleft()
        outcomes = future.result().outcomes
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, Tensor)]

    def _bring(self, tenant: int, keep: set[int] | None = None) -> None:
        if tenant in self._resident:
            self._resident.move_to_end(tenant)
            return
        module = self._work.module(tenant)
        while (reservation := self._arena.reserve(module.header, str(tenant))) is None:
            self._evict(keep or set())
        pieces = module_pieces(module, reservation)
        self._arrivals[str(tenant)] = self._uploads.start(pieces, str(tenant))
        self._resident[tenant] = module.moved(reservation, self._arena.device)
        self.num_uploads += 1
        self.upload_bytes += sum(src.nbytes for _, _, src in pieces)

    def _evict(self, keep: set[int]) -> None:
        """The module that was used longest ago, after the batches in flight if they use all others."""
        used = keep.union(*(tenants for tenants, _ in self._in_flight))
        victim = next((tenant for tenant in self._resident if tenant not in used), None)
        if victim is not None:
            self._arrivals.pop(str(victim)).synchronize()
            self._arena.release(self._resident.pop(victim))
        elif self._in_flight:
            self._finish()
        else:
            raise ConfigError(f"one batch uses {len(keep)} modules and the budget holds fewer; raise --budgets")


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    neighbours = Neighbours()
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(dir=args.scratch) as scratch,
        progress_bar() as progress,
    ):
        total = len(args.shapes) * len(args.kinds) * len(args.budgets) * (args.rounds + _WARMUP)
        done = itertools.count(1)
        for shape in args.shapes:
            backbone = read_backbone(write_backbone(shape, Path(scratch) / shape, seed=0))
            for kind, budget in itertools.product(args.kinds, args.budgets):
                tick = partial(_tell, progress, f"overlap: {shape} {kind}, room for {budget:.0%}", done, total)
                work = _work(args, backbone, kind, Path(scratch))
                rows += [
                    {"shape": shape, "kind": kind, "tenants": args.tenants, "budget": budget} | row
                    for row in _measure(args, work, budget, Path(scratch), tick)
                ]
    result = {
        "benchmark": "overlap",
        "machine": describe() | neighbours.report(),
        "commit": commit(),
        "config": {name: getattr(args, name) for name in ("requests", "lengths", "batches", "rounds", "threads")},
        "rows": rows,
    }
    publish(result, args)


def _tell(progress: Progress, what: str, done: Iterator[int], total: int) -> None:
    progress(what, next(done), total)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vbert bench overlap", description=__doc__)
    output_flags(parser)
    parser.add_argument("--shapes", nargs="+", choices=ALL_SHAPES, default=["minilm-l6"], help="random weights")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["lora"])
    parser.add_argument("--tenants", type=int, default=10_000, metavar="N")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.01, 0.1], metavar="SHARE")
    parser.add_argument("--requests", type=int, default=64, help="of one batch")
    parser.add_argument("--lengths", choices=LENGTHS, default="equal", help="32 tokens each, or those of real texts")
    parser.add_argument("--batches", type=int, default=16, help="of one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--trace", default="", help="Chrome trace of both, with the lanes on", metavar="FILE")
    parser.add_argument("--scratch", type=Path, help="where backbones and tables are written")
    return parser.parse_args(argv)


def _work(args: argparse.Namespace, backbone: Backbone, kind: str, scratch: Path) -> Work:
    model = Model.load(backbone, args.dtype, args.device)
    modules = KINDS[kind](backbone, min(DISTINCT_MODULES, args.tenants), seed=0)
    requests = make_requests(args.requests, 1, args.lengths, vocab_size=backbone.config.vocab_size, seed=0)
    rng = np.random.default_rng(0)
    weights = np.arange(1, args.tenants + 1, dtype=np.float64) ** -ZIPF_EXPONENT
    drawn = rng.choice(args.tenants, (args.batches, args.requests), p=weights / weights.sum())
    table = scratch / f"words-{backbone.fingerprint[-16:]}.safetensors"
    if not table.exists():
        publish_rows(table, backbone.weights["word_embeddings"].to(model.dtype), backbone.fingerprint)
    words = MappedRows(table, backbone.fingerprint)
    pinned = None
    if model.device.type == "cuda":
        pinned = Slabs(open_device(model.device, MonotonicClock()).pinned(DISTINCT_MODULES * _MOST_PINNED))
    sources = load(model, backbone, modules, scratch, memory=pinned)
    return Work(backbone, kind, sources, requests.token_ids, drawn.tolist(), words)


def _measure(args: argparse.Namespace, work: Work, budget: float, scratch: Path, tick: Any) -> list[dict[str, Any]]:
    settings = [(case, lanes) for case in CASES for lanes in (False, True)]
    num_slots, num_batches = int(args.tenants * budget), args.batches * (args.rounds + _WARMUP)
    with ExitStack() as stack:
        systems = {
            f"{case} {'on' if lanes else 'off'}": stack.enter_context(
                System(work, case, lanes=lanes, num_slots=num_slots, scratch=scratch, args=args)
            )
            for case, lanes in settings
        }
        _check(work, systems.values())
        before = {name: (system.num_uploads, system.upload_bytes, system.seconds()) for name, system in systems.items()}
        rounds = interleave(systems, rounds=args.rounds, warmup=_WARMUP, tick=tick)
        rows = []
        for name, system in systems.items():
            case, lanes = name.split()
            num, num_bytes, seconds = before[name]
            spent = {what: s - seconds[what] for what, s in system.seconds().items()}
            busy_s = spent["module"] + spent["batch"]
            timing = Timing(tuple(s / args.batches for s in rounds[name].seconds))
            measured = {
                "uploads_per_batch": round((system.num_uploads - num) / num_batches, 2),
                "upload_mb_per_batch": round((system.upload_bytes - num_bytes) / num_batches / 1e6, 3),
                "rows_ms": round(spent["batch"] / num_batches * 1e3, 3),
                "modules_ms": round(spent["module"] / num_batches * 1e3, 3),
                "wait_ms": round(spent["wait"] / num_batches * 1e3, 3),
                "hidden": round(max(0.0, 1 - spent["wait"] / busy_s), 3) if lanes == "on" and busy_s else None,
            }
            rows.append({"system": case, "lanes": lanes} | timing.row(args.requests) | measured)
    return rows


def _check(work: Work, systems: Iterable[System]) -> None:
    """The first batch of every system has the answers of the plain forward on the CPU, in float32."""
    model = Model.load(work.backbone, "float32", "cpu")
    modules = KINDS[work.kind](work.backbone, len(work.modules), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        exact = load(model, work.backbone, modules, Path(folder))
    plain = work.sequences(0, {t: exact[t % len(exact)] for t in work.tenants[0]})
    expected = model.forward(model.pack(plain))
    for system in systems:
        for answer, want in zip(system.first, expected, strict=True):
            assert_answer(answer, want, work.words.dtype)


if __name__ == "__main__":
    main()
