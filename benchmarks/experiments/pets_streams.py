"""PetS, Fig. 11: do operators of tasks of different kinds run faster on several streams? `vbert bench pets_streams`

Batches of 128 queries of one length for 128, 64 and 32 tasks, drawn at random, of the four kinds of the paper in turn
(masks of 5 %, differences of 1 %, biases, bottlenecks of 64): on 1 to 32 operator streams, and on as many as the engine
chooses. Tasks of one kind share their operators here, so four streams is all that can be used; the paper has one
operator a task. Answers are compared with those of one stream before anything is timed. Needs a GPU.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiments.pets_throughput import load_task
from benchmarks.machine import Neighbours, commit, describe
from benchmarks.plots import Panel, draw, plot_flag
from benchmarks.progress import track
from benchmarks.report import output_flags, publish
from benchmarks.timing import interleave
from benchmarks.workload import ALL_SHAPES, PETS_KINDS, write_backbone
from runtime.clock import MonotonicClock
from runtime.forwards import Forwards
from runtime.launch import Launch
from runtime.probes import Probes
from runtime.streams import CudaDevice
from runtime.threads import ThreadChoice
from runtime.uploads import all_moved_at_once
from tests.tolerances import assert_answer
from vbert.arena import ResidentTenant
from vbert.errors import ConfigError
from vbert.formats import Backbone, read_backbone
from vbert.model import Model, SequenceInput
from vbert.stream_counts import MAX_STREAMS

__all__ = ["main", "panels"]

AUTOMATIC = 0
QUERIES, BATCH = 1024, 128
_WARMUP = 2  # rounds of QUERIES / BATCH batches, in which the choice tries each number

Batches = Sequence[Sequence[SequenceInput]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="vbert bench pets_streams", description=__doc__)
    output_flags(parser)
    plot_flag(parser)
    parser.add_argument("--shape", choices=tuple(ALL_SHAPES), default="12x768")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tasks", type=int, nargs="+", default=[128, 64, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, MAX_STREAMS, AUTOMATIC], metavar="N")
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device, and streams are of a GPU; run this on a machine with one")
    if 1 not in args.streams:
        raise ConfigError(f"streams are {args.streams}; 1 must be among them, for the others are compared with it")
    neighbours = Neighbours()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        backbone = read_backbone(write_backbone(args.shape, Path(folder) / "backbone", seed=0))
        systems = {count: stack.enter_context(System(backbone, count, args)) for count in args.streams}
        tasks = _on_device(backbone, systems[1].model, max(args.tasks), Path(folder))
        cells = [(count, length) for count in args.tasks for length in args.lengths]
        rows = [row for cell in track(cells, "tasks and lengths") for row in _cell(systems, tasks, *cell, args.rounds)]
    named = ("shape", "dtype", "graphs", "rounds")
    result = {
        "benchmark": "pets_streams",
        "machine": describe() | neighbours.report() | {"device": torch.cuda.get_device_name()},
        "commit": commit(),
        "config": {name: getattr(args, name) for name in named} | {"queries": QUERIES, "batch": BATCH},
        "rows": rows,
    }
    publish(result, args)
    if args.plot:
        draw(args.plot, panels(rows))


def panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """Queries a second to those of one stream, by length, for each number of tasks."""
    return [
        Panel(
            title=f"{tasks} tasks",
            x="tokens a query",
            y="to one stream",
            series={
                system: {
                    row["lengths"]: row["to_one_stream"]
                    for row in rows
                    if (row["tenants"], row["system"]) == (tasks, system)
                }
                for system in dict.fromkeys(row["system"] for row in rows)
            },
        )
        for tasks in dict.fromkeys(row["tenants"] for row in rows)
    ]


class System:
    """The lanes of an engine, without its queue, on a number of operator streams."""

    def __init__(self, backbone: Backbone, num_streams: int, args: argparse.Namespace) -> None:
        self.model = Model.load(backbone, args.dtype, "cuda", graphs=args.graphs, operator_streams=num_streams)
        self._stack = ExitStack()
        device = CudaDevice(self.model.device)
        self._stack.callback(device.close)
        compute, rows, results = (self._stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3))
        self._forwards = Forwards(
            self.model,
            device,
            compute,
            clock=MonotonicClock(),
            threads=ThreadChoice((1,)),
            rows=rows,
            results=results,
        )

    def __enter__(self) -> System:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, batches: Batches) -> list[Tensor]:
        """The answers of all sequences."""
        futures = [self._forwards.submit(Launch(i, batch)) for i, batch in enumerate(batches)]
        answers: list[Tensor] = []
        for outcome in (outcome for future in futures for outcome in future.result().outcomes):
            if isinstance(outcome, Exception):
                raise outcome
            answers.append(outcome)
        return answers


def _on_device(backbone: Backbone, model: Model, count: int, folder: Path) -> list[ResidentTenant]:
    probes = Probes(backbone, model.dtype, folder)
    loaded = [load_task(probes, *PETS_KINDS[i % len(PETS_KINDS)], name=str(i)) for i in range(count)]
    tasks = all_moved_at_once(loaded, model)
    torch.cuda.synchronize()  # the systems have streams of their own
    return tasks


def _cell(
    systems: dict[int, System], tasks: Sequence[ResidentTenant], count: int, length: int, rounds: int
) -> list[dict[str, Any]]:
    chance = random.Random(count)
    queries = [
        SequenceInput([chance.randrange(1_000, 20_000) for _ in range(length)], [0] * length, tasks[task])
        for task in (chance.randrange(count) for _ in range(QUERIES))
    ]
    batches = [queries[i : i + BATCH] for i in range(0, QUERIES, BATCH)]
    want = systems[1].run(batches)
    for system in systems.values():
        for got, one in zip(system.run(batches), want, strict=True):
            assert_answer(got, one, system.model.dtype)
    runs = {str(num_streams): lambda system=system: system.run(batches) for num_streams, system in systems.items()}
    timings = interleave(runs, rounds=rounds, warmup=_WARMUP)
    found = {num_streams: timings[str(num_streams)].row(QUERIES) for num_streams in systems}
    return [
        {"system": _name(num_streams), "streams": num_streams}
        | {"tenants": count, "lengths": length}
        | row
        | {"to_one_stream": round(row["requests_per_s"] / found[1]["requests_per_s"], 3)}
        for num_streams, row in found.items()
    ]


def _name(num_streams: int) -> str:
    return {AUTOMATIC: "automatic", 1: "1 stream"}.get(num_streams, f"{num_streams} streams")


if __name__ == "__main__":
    main()
