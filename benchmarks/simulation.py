"""Is the simulator fast, is its cost model right, does it foretell a server, who wins? `vbert bench simulation`

- *speed*: a million made-up requests through the default policy and first come, first served, on one core;
- *cost*: a full profile is measured twice, how far its points differ; and batches of all kinds, lengths and numbers of
  tenants, each against what the profile says;
- *replay*: an engine with 64 LoRA tenants is asked by clients that wait for nobody (Poisson), at 50, 70 and 90 % of
  what it answered just before when it was saturated, and records its requests (`--record`); they are simulated with
  that profile, and the mean latencies compared;
- *overload*: the same requests, more than there is capacity for, through every policy.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvloop
from rich.console import Console
from rich.progress import Progress

from benchmarks.machine import Neighbours, commit, describe
from benchmarks.ours import random_loras
from benchmarks.report import output_flags, publish
from benchmarks.serving import BACKBONE, texts
from benchmarks.timing import interleave
from runtime import Engine, EngineConfig
from runtime.arrivals import Traffic, make_requests
from runtime.clock import MonotonicClock
from runtime.cost import CostModel
from runtime.pace import STEADY
from runtime.policies.named import DEFAULT, POLICIES, POOLED, batch_policy
from runtime.probes import Probes
from runtime.profile_file import write_profile
from runtime.profiler import FULL, Profiler
from runtime.request_log import read_log
from runtime.simulation_report import report
from runtime.simulator import World, simulate
from vbert.arena import ResidentTenant
from vbert.checkpoint import write_tenant
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.model import Model, SequenceInput
from vbert.tokenizer import Tokenizer

__all__ = ["main"]

PARTS = ("speed", "cost", "replay", "overload")
LINE = CostModel.on_a_line(15_000.0, 0.002)  # tokens a second and seconds a batch, where no machine is meant
TENANTS = 64
_BATCHES, _ROUNDS = 60, 9  # whose cost is foretold, and how often each is measured
_QUEUE = 100_000  # inputs: nobody is refused while latencies are compared
_SATURATED_S, _CLIENTS = 8.0, 256  # to learn what the engine is capable of

Rows = list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    neighbours = Neighbours()
    rows: Rows = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("simulation", total=len(args.parts))

        def told(part: str) -> bool:
            if part in args.parts:
                bar.update(task, description=part, advance=1)
            return part in args.parts

        if told("speed"):
            rows += _speed(args)
        if told("overload"):
            rows += _overload(args)
        if "cost" in args.parts or "replay" in args.parts:
            if not (args.backbone / "config.json").exists():
                raise ConfigError(f"no backbone at {args.backbone}; run `make serve` once, or give --backbone FOLDER")
            backbone = read_backbone(args.backbone)
            cost = _profile(backbone, args.threads)
            if told("cost"):
                rows += _cost(backbone, cost, args.threads)
            if told("replay"):
                rows += uvloop.run(_replay(args, backbone, cost))
    names = ("requests", "seconds", "threads", "max_batch_tokens", "deadline_s")
    result = {
        "benchmark": "simulation",
        "machine": describe() | neighbours.report(),
        "commit": commit(),
        "config": {name: getattr(args, name) for name in names} | {"backbone": args.backbone.name},
        "rows": rows,
    }
    publish(result, args)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vbert bench simulation", description=__doc__)
    output_flags(parser)
    parser.add_argument("--backbone", type=Path, default=BACKBONE, help="default: the one of `make serve`")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--requests", type=int, default=1_000_000, help="of the part speed; overload takes a fiftieth")
    parser.add_argument("--seconds", type=float, default=60.0, help="that each load of the part replay lasts")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.7, 0.9], help="of the part replay")
    parser.add_argument("--deadline-s", type=float, default=2.0, help="of the part overload")
    parser.add_argument("--max-batch-tokens", type=int, default=1024, help="of the part replay")
    parser.add_argument("--threads", type=int, default=1, help="that compute")
    return parser.parse_args(argv)


# ---- made-up requests ----------------------------------------------------------------------------------------------


def _speed(args: argparse.Namespace) -> Rows:
    rows = []
    world = World(batch_s=LINE.batch_s)
    for load, name in itertools.product((0.7, 1.2), (DEFAULT, "fcfs-packing", "fcfs")):
        requests = make_requests(_traffic(world, load, args.requests, deadline_s=args.deadline_s))
        begin = time.perf_counter()
        done = simulate(requests, batch_policy(name), world)
        seconds = time.perf_counter() - begin
        row = {"part": "speed", "policy": name, "load": load, "requests": args.requests, "seconds": round(seconds, 2)}
        rows.append(row | {"answered": int(done.is_ok().sum())})
    return rows


def _overload(args: argparse.Namespace) -> Rows:
    rows = []
    world = World(batch_s=LINE.batch_s)
    kinds = itertools.product((1.2, 1.5), ("poisson", "bursts"), ("zipf", "heavy"))
    for load, arrivals, popularity in kinds:
        traffic = _traffic(world, load, args.requests // 50, arrivals, popularity, args.deadline_s)
        requests = make_requests(traffic)
        for name in (*POLICIES, *POOLED):
            done = simulate(requests, batch_policy(name, LINE), world)
            facts = {"part": "overload", "load": load, "arrivals": arrivals, "popularity": popularity, "policy": name}
            rows.append(facts | report(requests, done, lambda tokens: world.batch_s(tokens, 1, 1)))
    return rows


def _traffic(
    world: World,
    load: float,
    requests: int,
    arrivals: str = "poisson",
    popularity: str = "zipf",
    deadline_s: float | None = None,
) -> Traffic:
    mean = 32.0
    return Traffic(
        requests=requests,
        rate=load * world.tokens_per_s / mean,
        arrivals=arrivals,
        popularity=popularity,
        mean_tokens=mean,
        deadline_s=deadline_s,
    )


# ---- the cost model ------------------------------------------------------------------------------------------------


def _profile(backbone: Backbone, threads: int) -> CostModel:
    with tempfile.TemporaryDirectory() as folder:
        return Profiler(
            backbone=backbone,
            model=Model.load(backbone),
            folder=Path(folder),
            thread_counts=(threads,),
            effort=FULL,
            clock=MonotonicClock(),
        ).run()


def _cost(backbone: Backbone, cost: CostModel, threads: int) -> Rows:
    again = _profile(backbone, threads)
    differ = [
        abs(a.seconds - b.seconds) / a.seconds
        for name, curve in cost.curves.items()
        for a, b in zip(curve.points, again.curves[name].points, strict=False)
        if not name.startswith(("load", "gather"))
    ]
    found = _foretold(backbone, cost)
    errors = [abs(told_s - seconds) / seconds for told_s, seconds in found]
    row = {"part": "cost", "points": len(differ), "noise": round(cost.noise, 4), "batches": len(found)}
    row |= {f"repeat_p{q}": round(float(np.percentile(differ, q)), 4) for q in (50, 90)}
    row |= {f"error_p{q}": round(float(np.percentile(errors, q)), 4) for q in (50, 90)}
    return [row | {"bias": round(float(np.median([told_s / seconds for told_s, seconds in found])), 4)}]


def _foretold(backbone: Backbone, cost: CostModel) -> list[tuple[float, float]]:
    """Seconds told and measured, of batches drawn at random; the median of a few rounds through all of them."""
    rng, model = random.Random(0), Model.load(backbone)
    told_s, runs = [], {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        probes = Probes(backbone, model.dtype, Path(folder))
        loaded: dict[tuple[str, int], list[ResidentTenant]] = {
            kind: [probes.load(probes.write(kind[1], name=str(i), kind=kind[0])) for i in range(32)]
            for kind in FULL.kinds
        }
        for batch in range(_BATCHES):
            kind, length, inputs = rng.choice(FULL.kinds), rng.choice((8, 16, 24, 48, 96)), rng.choice((2, 8, 20))
            tenants = loaded[kind][: rng.choice((1, 4, 12, 32))]
            lengths = [max(3, round(length * rng.uniform(0.5, 1.5))) for _ in range(inputs)]
            sequences = [
                SequenceInput([(17 * n + i) % 20_000 + 1_000 for i in range(one)], [0] * one, tenants[n % len(tenants)])
                for n, one in enumerate(lengths)
            ]
            told_s.append(cost.batch_s(sum(lengths), inputs, min(inputs, len(tenants)), kind))
            runs[str(batch)] = partial(_forward, model, sequences)
        timings = interleave(runs, rounds=_ROUNDS, warmup=1)
    return [(told, float(np.median(timings[name].seconds))) for told, name in zip(told_s, runs, strict=True)]


def _forward(model: Model, sequences: Sequence[SequenceInput]) -> None:
    model.forward(model.pack(sequences))


# ---- a server's day, again -----------------------------------------------------------------------------------------


async def _replay(args: argparse.Namespace, backbone: Backbone, cost: CostModel) -> Rows:
    rows = []
    batch_s = partial(cost.batch_s, module=("low_rank", 8))
    world = World(batch_s=batch_s, max_batch_tokens=args.max_batch_tokens, max_queue_inputs=_QUEUE)
    words = list(itertools.islice(texts(), 2000))
    tokens = [len(each.token_ids) for each in Tokenizer.load(backbone.folder, backbone.config).encode(words)]
    modules = [write_tenant(module) for module in random_loras(backbone, TENANTS, seed=0)]
    for load in args.loads:
        with tempfile.TemporaryDirectory() as folder:
            log, profile = Path(folder) / "requests.log", Path(folder) / "profile.json"
            write_profile(profile, cost)
            config = EngineConfig(
                backbone=str(args.backbone),
                store=str(Path(folder) / "store"),
                compute_threads=args.threads,
                max_batch_tokens=args.max_batch_tokens,
                max_queue_inputs=_QUEUE,
                max_caller_share=1.0,
                default_deadline_s=600.0,
                profile=str(profile),
            )
            async with Engine(config) as engine:
                for i, module in enumerate(modules):
                    await engine.add_tenant(f"t{i}", module)
                capacity = await _capacity(engine, words, tokens)
            async with Engine(replace(config, record=str(log))) as engine:
                for i in range(TENANTS):
                    await engine.embed(f"t{i}", ["it is in memory and tested"])
                begin_s = time.perf_counter()
                await _ask(engine, words, load * capacity / float(np.mean(tokens)), args.seconds)
                lasted_s = time.perf_counter() - begin_s
            recorded = read_log(log)
        asked = [(r, s) for r, s in zip(recorded.requests, recorded.total_s, strict=True)][TENANTS:]
        requests = [request for request, _ in asked]
        measured_ms = [1e3 * seconds for _, seconds in asked if seconds == seconds]
        pace = recorded.pace(batch_s)
        mean_ms = float(np.mean(measured_ms))
        found = {
            name: report(
                requests,
                simulate(requests, batch_policy(DEFAULT), replace(world, pace=each)),
                lambda tokens: batch_s(tokens, 1),
            )
            for name, each in (("profile", STEADY), ("line", pace.mean), ("seconds", pace))
        }
        row = found["seconds"]
        rows.append(
            {
                "part": "replay",
                "load": load,
                "capacity": round(capacity, 1),
                "requests": len(requests),
                "seconds": round(lasted_s, 1),
                "measured_mean_ms": round(mean_ms, 2),
                "measured_p99_ms": round(float(np.percentile(measured_ms, 99)), 2),
                "simulated_mean_ms": row["mean_ms"],
                "simulated_p99_ms": row["p99_ms"],
                "ratio": round(row["mean_ms"] / mean_ms, 4),
                "ratio_line": round(found["line"]["mean_ms"] / mean_ms, 4),
                "ratio_profile": round(found["profile"]["mean_ms"] / mean_ms, 4),
                "slope": round(pace.slope, 4),
                "fixed_ms": round(1e3 * pace.fixed_s, 3),
            }
        )
    return rows


async def _capacity(engine: Engine, words: Sequence[str], tokens: Sequence[int]) -> float:
    """Tokens a second that the engine answers when as many clients ask as fill its batches."""
    numbers, answered = itertools.count(), 0
    begin_s = time.perf_counter()
    warm_s, end_s = begin_s + _SATURATED_S / 4, begin_s + _SATURATED_S

    async def ask() -> None:
        nonlocal answered
        while time.perf_counter() < end_s:
            n = next(numbers)
            await engine.embed(f"t{n % TENANTS}", [words[n % len(words)]])
            if warm_s <= time.perf_counter() < end_s:
                answered += tokens[n % len(words)]

    await asyncio.gather(*(ask() for _ in range(_CLIENTS)))
    return answered / (end_s - warm_s)


async def _ask(engine: Engine, words: Sequence[str], rate: float, seconds: float) -> None:
    """One real text a request, of a tenant at random, when its time has come, whatever became of those before."""
    rng = random.Random(1)
    tasks, at_s = [], 0.0
    begin_s = time.perf_counter()
    for n in itertools.count():
        at_s += rng.expovariate(rate)
        if at_s > seconds:
            break
        await asyncio.sleep(max(0.0, at_s - (time.perf_counter() - begin_s)))
        work = engine.embed(f"t{rng.randrange(TENANTS)}", [words[n % len(words)]])
        tasks.append(asyncio.create_task(work))
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    main()
