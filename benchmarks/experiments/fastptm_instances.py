"""FastPTM, Fig. 3 to 7, for real: many fine-tuned models, few in memory at a time. `vbert bench fastptm_instances`

Requests of 16 inputs of 128 tokens (`--items`, `--tokens`) come 0.1 s apart, of 12 kinds in turn (*cyclic*, Fig. 3, 4)
or at random with gaps of Normal(M, M / 3), as the published traces are (Fig. 5 to 7), through 1, 2 and 3 instances:

- *full loading*: the authors' baseline as coded. A queue for each instance, joined in turn; each job builds the model,
  loads the original checkpoint, then the fine-tuned one, and computes its inputs one by one;
- *weight swap*: theirs, and the fair baseline. The model is built once; only where the kind changes the fine-tuned
  weights are read and copied into it. Queues in turn (`round-robin`), as they measured it;
- *vbert, POLICY*: this engine with `--policy POLICY --instances N`, a budget of as many models, and all inputs of a
  request at once. `fair` is its default policy in the same memory.

An instance of the baselines is a thread with its part of the cores; vbert has one lane with all that are given.
total: from the first arrival to the last answer. overtimes: waited for more than 3 s until its computation began, a
load included. A switch is a load of weights into memory. Policies are told the deadline of 3 s, and what an input and a
load take here.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers import logging as transformers_logging

from benchmarks.experiments.fastptm_switch import fine_tuned
from benchmarks.machine import Neighbours, commit, describe
from benchmarks.plots import Panel, draw, plot_flag
from benchmarks.progress import track
from benchmarks.report import output_flags, publish
from benchmarks.timing import interleave
from benchmarks.workload import ALL_SHAPES, write_backbone
from runtime import Engine, EngineConfig
from runtime.cost import TYPICAL_LENGTH, CostModel
from runtime.policies.instances import INSTANCE_POLICIES
from runtime.policies.named import Instances, batch_policy
from runtime.probes import Probes
from runtime.uploads import all_moved_at_once
from vbert.formats import read_backbone
from vbert.model import Model, SequenceInput

__all__ = ["main", "panels"]

DEADLINE_S = 3.0
BASELINES = ("full loading", "weight swap")
POLICIES = ("fair", *INSTANCE_POLICIES)

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Ask:
    kind: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds from its arrival: until its computation began, and until it was there."""

    queued_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Models:
    """The original and the fine-tuned ones, as folders; what each request asks."""

    original: Path
    tuned: tuple[Path, ...]
    items: int
    tokens: int
    device: str

    @property
    def ids(self) -> list[int]:
        return [1 + i % 64 for i in range(self.tokens)]


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    transformers_logging.set_verbosity_error()
    neighbours = Neighbours()
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        original = write_backbone(args.shape, Path(folder) / "original", seed=0)
        tuned = [fine_tuned(original, Path(folder) / f"tuned{i}", seed=i + 1) for i in range(args.kinds)]
        models = Models(original, tuple(tuned), args.items, args.tokens, args.device)
        args.cost, args.load_s = _costs(models, args.threads)
        cells = [(trace, count) for trace in args.traces for count in args.instances]
        rows = [row for cell in track(cells, "traces and instances") for row in _cell(models, *cell, args)]
    names = ("shape", "device", "kinds", "requests", "items", "tokens", "threads")
    result = {
        "benchmark": "fastptm_instances",
        "machine": describe() | neighbours.report(),
        "commit": commit(),
        "config": {name: getattr(args, name) for name in names},
        "rows": rows,
    }
    publish(result, args)
    if args.plot:
        draw(args.plot, panels(rows))


def panels(rows: Rows) -> list[Panel]:
    """Seconds to the last answer, requests that waited too long, and loads, by trace and instances."""
    titles = {"total_s": "seconds in all", "overtimes": "waited over 3 s", "switches": "loads of weights"}
    return [
        Panel(
            title=title,
            x="trace, instances",
            y=title,
            series={
                system: {f"{row['trace']}, {row['instances']}": row[name] for row in rows if row["system"] == system}
                for system in dict.fromkeys(row["system"] for row in rows)
            },
        )
        for name, title in titles.items()
    ]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vbert bench fastptm_instances", description=__doc__)
    output_flags(parser)
    plot_flag(parser)
    parser.add_argument("--shape", choices=tuple(ALL_SHAPES), default="minilm-l6")
    parser.add_argument("--kinds", type=int, default=12, help="fine-tuned models")
    parser.add_argument("--requests", type=int, default=240, help="of each trace")
    parser.add_argument("--items", type=int, default=16, help="inputs of a request")
    parser.add_argument("--tokens", type=int, default=128, help="of an input")
    parser.add_argument(
        "--traces",
        nargs="+",
        default=["cyclic", "0.05", "0.1"],
        help="cyclic, or mean gaps of random kinds, in seconds",
    )
    parser.add_argument("--instances", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--systems", nargs="+", choices=(*BASELINES, *POLICIES), default=[*BASELINES, *POLICIES])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="cores that compute")
    parser.add_argument("--scratch", type=Path, help="where the models are written (default: the system's folder)")
    return parser.parse_args(argv)


def _cell(models: Models, trace: str, instances: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    asked = _asked(trace, args.requests, args.kinds)
    for system in args.systems:
        gc.collect()
        if system in BASELINES:
            torch.set_num_threads(max(1, args.threads // instances))
            found = _on_threads(models, asked, instances, each_time=system == BASELINES[0])
        else:
            found = asyncio.run(_served(models, asked, instances, system, args))
        name = system if system in BASELINES else f"vbert, {system}"
        yield {"trace": trace, "instances": instances, "system": name} | found


def _asked(trace: str, requests: int, kinds: int) -> list[Ask]:
    if trace == "cyclic":
        return [Ask(i % kinds, 0.1 * i) for i in range(requests)]
    rng, mean = np.random.default_rng(0), float(trace)
    gaps = np.maximum(rng.normal(mean, mean / 3, requests), 1e-3)
    every = zip(rng.integers(kinds, size=requests).tolist(), np.cumsum(gaps).tolist(), strict=True)
    return [Ask(kind, at_s) for kind, at_s in every]


def _judged(answers: Sequence[Answer], total_s: float, switches: int, switch_s: float | None) -> dict[str, Any]:
    latency_s = [answer.total_s for answer in answers]
    return {
        "total_s": round(total_s, 2),
        "overtimes": sum(answer.queued_s > DEADLINE_S for answer in answers),
        "late": sum(seconds > DEADLINE_S for seconds in latency_s),
        "switches": switches,
        "switch_ms": None if switch_s is None else round(1e3 * switch_s, 2),
        "mean_s": round(float(np.mean(latency_s)), 3),
        "p99_s": round(float(np.percentile(latency_s, 99)), 3),
    }


# ---- baselines -----------------------------------------------------------------------------------------------------


def _on_threads(models: Models, asked: Sequence[Ask], instances: int, *, each_time: bool) -> dict[str, Any]:
    """A thread and a queue for each instance, joined in turn. each_time: build and load for each job."""
    queues: list[queue.SimpleQueue[tuple[Ask, float] | None]] = [queue.SimpleQueue() for _ in range(instances)]
    answers: list[Answer] = []
    switches_s: list[float] = []
    workers = [
        threading.Thread(target=_work, args=(models, mine, answers.append, switches_s.append, each_time))
        for mine in queues
    ]
    for worker in workers:
        worker.start()
    begin_s = time.perf_counter()
    for n, ask in enumerate(asked):
        time.sleep(max(0.0, begin_s + ask.at_s - time.perf_counter()))
        queues[n % instances].put((ask, begin_s + ask.at_s))
    for mine in queues:
        mine.put(None)
    for worker in workers:
        worker.join()
    total_s = time.perf_counter() - begin_s - asked[0].at_s
    return _judged(answers, total_s, len(switches_s), float(np.mean(switches_s)))


def _work(
    models: Models,
    mine: queue.SimpleQueue[tuple[Ask, float] | None],
    answered: Callable[[Answer], None],
    switched: Callable[[float], None],
    each_time: bool,
) -> None:
    ids = torch.tensor([models.ids], device=models.device)
    held: int | None = None
    model = None if each_time else _built(models)
    while (job := mine.get()) is not None:
        ask, came_s = job
        before_s = time.perf_counter()
        if model is None or each_time or ask.kind != held:
            if model is None or each_time:
                model = _built(models)
            model.load_state_dict(load_file(models.tuned[ask.kind] / "model.safetensors"))
            held = ask.kind
            switched(time.perf_counter() - before_s)
        begin_s = time.perf_counter()
        with torch.inference_mode():
            for _ in range(models.items):
                model(input_ids=ids)
            if models.device == "cuda":
                torch.cuda.current_stream().synchronize()
        answered(Answer(begin_s - came_s, time.perf_counter() - came_s))


def _built(models: Models) -> PreTrainedModel:
    """A new module with the original's weights. Not by from_pretrained, which no other thread may compute beside."""
    config = AutoConfig.from_pretrained(models.original, num_labels=2)
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(load_file(models.original / "model.safetensors"), strict=False)
    return model.eval().to(models.device)


# ---- ours ----------------------------------------------------------------------------------------------------------


async def _served(
    models: Models, asked: Sequence[Ask], instances: int, policy: str, args: argparse.Namespace
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        config = EngineConfig(
            backbone=str(models.original),
            store=str(Path(folder) / "store"),
            device=args.device,
            dtype="float32",  # as the baselines
            compute_threads=args.threads,
            store_dtype="float32",
            max_module_bytes=2**31,
            module_budget_bytes=_budget_bytes(models, instances),
            max_queue_inputs=len(asked) * models.items,
            max_caller_share=1.0,
            default_deadline_s=3600.0,
        )
        told = Instances(count=instances, deadline_s=DEADLINE_S, load_s=args.load_s)
        async with Engine(config, policy=batch_policy(policy, args.cost, instances=told)) as engine:
            for i, tuned in enumerate(models.tuned):
                await engine.add_tenant(f"t{i}", tuned)
                await engine.classify(f"t{i}", [models.ids])  # it is known, and tested
            before = engine.snapshot()
            begin_s = time.perf_counter()
            tasks = []
            for ask in asked:
                await asyncio.sleep(max(0.0, begin_s + ask.at_s - time.perf_counter()))
                tasks.append(asyncio.create_task(_ask(engine, models, ask.kind, begin_s + ask.at_s)))
            answers = await asyncio.gather(*tasks)
            total_s = time.perf_counter() - begin_s - asked[0].at_s
            after = engine.snapshot()
    return _judged(answers, total_s, after.loads["ok"] - before.loads["ok"], None)


async def _ask(engine: Engine, models: Models, kind: int, came_s: float) -> Answer:
    result = await engine.classify(f"t{kind}", [models.ids] * models.items)
    total_s = time.perf_counter() - came_s
    return Answer(total_s - result.timings.compute_s, total_s)


def _costs(models: Models, threads: int) -> tuple[CostModel, float]:
    """What an input takes in a request of so many, as a line through nothing, and what a load does."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        backbone = read_backbone(models.original)
        probes, model = Probes(backbone, torch.float32, Path(folder)), Model.load(backbone, "float32", models.device)
        file = probes.write(0, kind="weights")
        (tenant,) = all_moved_at_once([probes.load(file)], model)
        batch = [SequenceInput(models.ids, [0] * models.tokens, tenant)] * models.items
        runs = {"batch": lambda: model.forward(model.pack(batch)), "load": lambda: probes.load_and_release(file)}
        timings = interleave(runs, rounds=5)
    batch_s, load_s = (float(np.median(timings[name].seconds)) for name in ("batch", "load"))
    item_s = batch_s / models.items
    return CostModel.on_a_line(TYPICAL_LENGTH / item_s, 0.0), load_s


def _budget_bytes(models: Models, instances: int) -> int:
    """As much as so many of them take, and not one more."""
    size = (models.tuned[0] / "model.safetensors").stat().st_size
    return round((instances + 0.5) * size)


if __name__ == "__main__":
    main()
