"""PetS, Fig. 7, 8, 9, Table 5: one forward for many tasks, against a full model each. `vbert bench pets_throughput`

- *tasks* (Fig. 7): {1 x 128}, {2 x 64} and {4 x 32} queries a task, of 1 to 64 tasks in one batch, of the four kinds
  of the paper in turn (masks of 5 %, differences of 1 %, biases, bottlenecks of 64), next to one task; and the bare
  backbone on the same rows, which tells what the tasks' own work takes (Fig. 9);
- *full models* (Fig. 8): the same with a whole model for each task, in turn (SeqS) or by as many threads as there are
  cores (ParS), computed by this project's encoder, so that only the way differs;
- *memory* (Table 5): bytes of a task in memory next to those of a full model.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import Neighbours, commit, describe
from benchmarks.plots import Panel, draw, plot_flag
from benchmarks.progress import track
from benchmarks.report import output_flags, publish
from benchmarks.timing import interleave
from benchmarks.workload import ALL_SHAPES, PETS_KINDS, write_backbone
from runtime.probes import Probes
from runtime.uploads import all_moved_at_once
from vbert.arena import ResidentTenant
from vbert.formats import Backbone, read_backbone
from vbert.model import Model, SequenceInput

__all__ = ["load_task", "main", "panels"]

QUERIES = ((1, 128), (2, 64), (4, 32))
FULL_MODELS = (2, 4, 8, 16)

Rows = list[dict[str, Any]]
Run = Callable[[], object]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="vbert bench pets_throughput", description=__doc__)
    output_flags(parser)
    plot_flag(parser)
    parser.add_argument("--shape", choices=tuple(ALL_SHAPES), default="minilm-l6")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--full-models", type=int, nargs="*", default=list(FULL_MODELS), metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    neighbours = Neighbours()
    with tempfile.TemporaryDirectory() as folder:
        backbone = read_backbone(write_backbone(args.shape, Path(folder) / "backbone", seed=0))
        model = Model.load(backbone, "float32", args.device)
        probes = Probes(backbone, model.dtype, Path(folder))
        loaded = [load_task(probes, *PETS_KINDS[i % len(PETS_KINDS)], name=str(i)) for i in range(max(args.tasks))]
        models = [load_task(probes, "weights", 0, name=str(i)) for i in range(max(args.full_models, default=0))]
        tasks, whole = all_moved_at_once(loaded, model), all_moved_at_once(models, model)
        rows = _memory(tasks, whole)
        for count, length in track(QUERIES, "queries"):
            with torch.inference_mode():
                rows += _throughput(backbone, model, tasks, whole, count, length, args)
    result = {
        "benchmark": "pets_throughput",
        "machine": describe() | neighbours.report(),
        "commit": commit(),
        "config": {name: getattr(args, name) for name in ("shape", "rounds", "device", "threads")},
        "rows": rows,
    }
    publish(result, args)
    if args.plot is not None:
        draw(args.plot, panels(rows))


def panels(rows: Rows) -> list[Panel]:
    """Fig. 7, 8 and 9: queries/s by tasks, next to full models, and what the tasks' own work takes of the time."""
    speeds: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["part"] == "tasks":
            speeds.setdefault(row["queries"], {}).setdefault(row["system"], {})[row["tasks"]] = row["requests_per_s"]
    ours = {queries: of["vbert"] for queries, of in speeds.items()}
    own = {
        queries: {n: 1 - speed / of["bare backbone"][n] for n, speed in of["vbert"].items()}
        for queries, of in speeds.items()
    }
    found = [Panel(title="one forward for all tasks", x="tasks", y="queries/s", series=ours, bars=False)]
    for queries, of in speeds.items():
        beside = {name: {n: speed for n, speed in of[name].items() if n in FULL_MODELS} for name in of}
        found.append(Panel(title=f"{queries} a task, and full models", x="tasks", y="queries/s", series=beside))
    return [*found, Panel(title="tasks' own work", x="tasks", y="part of the time", series=own, bars=False)]


def load_task(probes: Probes, kind: str, size: int, name: str) -> ResidentTenant:
    return probes.load(probes.write(size, name=name, kind=kind))


def _memory(tasks: Sequence[ResidentTenant], whole: Sequence[ResidentTenant]) -> Rows:
    if not whole:
        return []
    mean = sum(task.num_bytes for task in tasks) / len(tasks)
    full = whole[0].num_bytes
    row = {"part": "memory", "system": "vbert", "task_bytes": round(mean), "model_bytes": full}
    return [row | {"models_to_tasks": round(full / mean, 1)}]


def _throughput(
    backbone: Backbone,
    model: Model,
    tasks: Sequence[ResidentTenant],
    whole: Sequence[ResidentTenant],
    count: int,
    length: int,
    args: argparse.Namespace,
) -> Rows:
    def sequences(tenants: Sequence[ResidentTenant | None]) -> list[SequenceInput]:
        return [SequenceInput(ids, [0] * length, t) for t in tenants for ids in _texts(count, length)]

    mine = threading.local()

    def begin() -> None:
        """A thread with one core, or with a stream and buffers of its own."""
        torch.set_num_threads(1)
        mine.model = model
        if model.device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(model.device))  # type: ignore[no-untyped-call]
            mine.model = Model.load(backbone, "float32", "cuda")

    def forward(tenants: Sequence[ResidentTenant | None]) -> None:
        computing: Model = getattr(mine, "model", model)
        computing.forward(computing.pack(sequences(tenants)))

    systems: dict[tuple[str, int], Run] = {}
    for n in args.tasks:
        systems["vbert", n] = partial(forward, tasks[:n])
        systems["bare backbone", n] = partial(forward, [None] * n)
    with ThreadPoolExecutor(args.threads, initializer=begin) as threads:
        for n in args.full_models:
            systems["full models in turn", n] = partial(_in_turn, forward, whole[:n])
            systems["full models, parallel", n] = partial(_parallel, threads, forward, whole[:n])
        timings = interleave({f"{name} x{n}": run for (name, n), run in systems.items()}, rounds=args.rounds, warmup=1)
    found = {key: timings[f"{key[0]} x{key[1]}"].row(key[1] * count) for key in systems}
    one = found["vbert", min(args.tasks)]["requests_per_s"]
    return [
        {"part": "tasks", "queries": f"{count} x {length}", "system": name, "tasks": n}
        | row
        | {"to_one_task": round(row["requests_per_s"] / one, 3)}
        for (name, n), row in found.items()
    ]


def _in_turn(forward: Callable[[Sequence[ResidentTenant]], None], models: Sequence[ResidentTenant]) -> None:
    for each in models:
        forward([each])


def _parallel(
    threads: ThreadPoolExecutor,
    forward: Callable[[Sequence[ResidentTenant]], None],
    models: Sequence[ResidentTenant],
) -> None:
    for done in [threads.submit(forward, [each]) for each in models]:
        done.result()


def _texts(count: int, length: int) -> Iterator[list[int]]:
    for n in range(count):
        yield [(7919 * n + 31 * i) % 20_000 + 1_000 for i in range(length)]


if __name__ == "__main__":
    main()
