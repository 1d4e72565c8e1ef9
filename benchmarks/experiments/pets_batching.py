"""PetS, Fig. 12: a pool of queries of many tasks, cut into batches by every strategy. `vbert bench pets_batching`

The pools are those of the authors: lengths int(N(32, std)) within 1 to 128, tasks and their kinds at random. A strategy
of runtime/policies/pools.py cuts a pool by costs that are measured here first, in seconds; its batches are computed

- *padded*: each query is as long as the longest of its batch, as in the authors' engine;
- *packed*: each is as long as it is, as in ours.

Against them *filled*, ours: as many tokens a batch as may be, queries as they came, packed. It needs no costs.

Cutting is timed by itself and is no part of queries/s. The answers of all packed batches are compared.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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
from runtime.cost import CostModel
from runtime.policies.pooled import ProfileCosts
from runtime.policies.pools import POOL_POLICIES, MacroBatch, Query
from runtime.probes import Probes
from runtime.profiler import Effort, Profiler
from runtime.sampler import Repeats
from runtime.uploads import all_moved_at_once
from vbert.arena import ResidentTenant
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.model import Model, SequenceInput

__all__ = ["BASELINE", "EFFORT", "launches_of", "main", "panels", "pool_of"]

MEAN, LONGEST, SEED = 32, 128, 1
BASELINE = "fixed, padded"
OURS = "filled, packed"
_EQUAL = 1e-3  # how far answers may be from those of other batches
EFFORT = Effort(  # what the strategies ask for, and the least of all else
    tokens=(32, 128, 512, 2048),
    lengths=(8, 32, 128),
    ranks=(1,),
    rows=(16,),
    ngrams=(4,),
    modules=(1,),
    kinds=PETS_KINDS,
    tenants=(1,),
    weights=False,
    repeats=Repeats(least=2, most=9, point_s=0.1, largest_s=1.0),
)

Rows = list[dict[str, Any]]
Launch = list[tuple[int, int]]  # of each query its place in the pool, and how many tokens are computed for it


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="vbert bench pets_batching", description=__doc__)
    output_flags(parser)
    plot_flag(parser)
    parser.add_argument("--shape", choices=tuple(ALL_SHAPES), default="minilm-l6")
    parser.add_argument("--tasks", type=int, nargs="+", default=[128, 64, 32])
    parser.add_argument("--std", type=float, nargs="+", default=[1, 2, 4, 8], help="of the lengths")
    parser.add_argument("--queries", type=int, default=1024, help="of a pool")
    parser.add_argument("--max-batch-tokens", type=int, default=4096, help="of every batch but the fixed ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    neighbours = Neighbours()
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        backbone = read_backbone(write_backbone(args.shape, Path(folder) / "backbone", seed=0))
        model = Model.load(backbone, "float32", args.device)
        cost = _cost(backbone, model, Path(folder), args.threads)
        rng = random.Random(SEED)
        kinds = [PETS_KINDS[rng.randint(0, len(PETS_KINDS) - 1)] for _ in range(max(args.tasks))]
        probes = Probes(backbone, model.dtype, Path(folder))
        tasks = all_moved_at_once([load_task(probes, *kind, name=str(i)) for i, kind in enumerate(kinds)], model)
        for count, std in track(list(itertools.product(args.tasks, args.std)), "pools"):
            pool = pool_of(kinds[:count], args.queries, std)
            cell = _measure(model, tasks, pool, ProfileCosts(cost, args.max_batch_tokens), args.rounds)
            rows += [{"tasks": count, "std": std} | row for row in cell]
    names = ("shape", "queries", "max_batch_tokens", "rounds", "device", "threads")
    result = {
        "benchmark": "pets_batching",
        "machine": describe() | neighbours.report(),
        "commit": commit(),
        "config": {name: getattr(args, name) for name in names} | {"cost_noise": round(cost.noise, 4)},
        "rows": rows,
    }
    publish(result, args)
    if args.plot is not None:
        draw(args.plot, panels(rows))


def panels(rows: Rows) -> list[Panel]:
    """Fig. 12: by spread of the lengths, one panel for each number of tasks."""
    found = []
    for tasks in dict.fromkeys(row["tasks"] for row in rows):
        series: dict[str, dict[float, float]] = {}
        for row in rows:
            if row["tasks"] == tasks:
                series.setdefault(row["system"], {})[row["std"]] = row["to_fixed"]
        found.append(Panel(title=f"{tasks} tasks", x="std of the lengths", y=f"queries/s to {BASELINE}", series=series))
    return found


def _cost(backbone: Backbone, model: Model, folder: Path, threads: int) -> CostModel:
    return Profiler(
        backbone=backbone,
        model=model,
        folder=folder,
        thread_counts=(threads,),
        effort=EFFORT,
        clock=MonotonicClock(),
    ).run()


# ---- pools and their batches ---------------------------------------------------------------------------------------


def pool_of(kinds: Sequence[tuple[str, int]], queries: int, std: float) -> list[Query]:
    """As the authors draw them. kinds: of each task, with its size."""
    rng = random.Random(SEED)
    drawn = np.random.RandomState(SEED).normal(MEAN, std, queries)
    lengths = np.clip(drawn.astype(int), 1, LONGEST).tolist()
    tasks = [rng.randint(0, len(kinds) - 1) for _ in lengths]
    return [Query(str(task), "{}/{}".format(*kinds[task]), length) for task, length in zip(tasks, lengths, strict=True)]


def launches_of(
    pool: Sequence[Query], plans: Mapping[str, Sequence[MacroBatch]], max_tokens: int
) -> dict[str, list[Launch]]:
    """Of every strategy padded and packed, and of ours."""
    found: dict[str, list[Launch]] = {}
    for name, plan in plans.items():
        batches = [(batch.length, [i for part in batch.parts for i in part.queries]) for batch in plan]
        found[f"{name}, padded"] = [[(i, longest) for i in places] for longest, places in batches]
        found[f"{name}, packed"] = [[(i, pool[i].length) for i in places] for _, places in batches]
    return found | {OURS: _filled(pool, max_tokens)}


def _filled(pool: Sequence[Query], max_tokens: int) -> list[Launch]:
    launches: list[Launch] = [[]]
    room = max_tokens
    for i, query in enumerate(pool):
        if query.length > room and launches[-1]:
            launches.append([])
            room = max_tokens
        launches[-1].append((i, query.length))
        room -= query.length
    return launches


# ---- one pool ------------------------------------------------------------------------------------------------------


def _measure(
    model: Model, tasks: Sequence[ResidentTenant], pool: Sequence[Query], costs: ProfileCosts, rounds: int
) -> Rows:
    plans, scheduling_ms = {}, {}
    for name, policy in POOL_POLICIES.items():
        policy.cut(pool, costs)  # costs of every length are worked out once, and kept by a server
        begin = time.perf_counter()
        plans[name] = policy.cut(pool, costs)
        scheduling_ms[name] = round(1e3 * (time.perf_counter() - begin), 2)
    every = launches_of(pool, plans, costs.max_tokens)
    answers: dict[str, dict[int, Tensor]] = {name: {} for name in every}
    batches = {name: _sequences(model, tasks, pool, launches) for name, launches in every.items()}
    runs = {name: partial(_compute, model, batches[name], every[name], answers[name]) for name in every}
    timings = interleave(runs, rounds=rounds, warmup=0)  # the profile has warmed all up
    _compare(answers)
    found = {name: timing.row(len(pool)) for name, timing in timings.items()}
    asked = sum(query.length for query in pool)
    return [
        {"system": name, "launches": len(every[name])}
        | {"padding": round(sum(tokens for launch in every[name] for _, tokens in launch) / asked, 3)}
        | {"scheduling_ms": scheduling_ms.get(name.split(",")[0], 0.0)}
        | {"to_fixed": round(row["requests_per_s"] / found[BASELINE]["requests_per_s"], 3)}
        | row
        for name, row in found.items()
    ]


def _sequences(
    model: Model, tasks: Sequence[ResidentTenant], pool: Sequence[Query], launches: Sequence[Launch]
) -> list[list[SequenceInput]]:
    """A longer query begins as the shorter one does."""
    words = model.config.vocab_size
    return [
        [
            SequenceInput([(7919 * i + 31 * k) % words for k in range(n)], [0] * n, tasks[int(pool[i].tenant)])
            for i, n in launch
        ]
        for launch in launches
    ]


def _compute(
    model: Model,
    batches: Sequence[Sequence[SequenceInput]],
    launches: Sequence[Launch],
    answers: dict[int, Tensor],
) -> None:
    for sequences, launch in zip(batches, launches, strict=True):
        found = model.forward(model.pack(sequences))
        answers.update((i, answer) for (i, _), answer in zip(launch, found, strict=True))


def _compare(answers: Mapping[str, Mapping[int, Tensor]]) -> None:
    ours = answers[OURS]
    for name, others in answers.items():
        if name.endswith("packed"):
            differ = max(float((others[i] - ours[i]).abs().max()) for i in ours)
            assert differ < _EQUAL, f"{name}: answers differ by {differ:.1e} from those of {OURS}"


if __name__ == "__main__":
    main()
