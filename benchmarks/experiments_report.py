"""The tables of benchmarks/experiments/ in docs/benchmarks.md: what FastPTM and PetS measured, measured here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

__all__ = ["tables"]

Row = Mapping[str, Any]
Markdown = Callable[[Sequence[str], Iterable[Sequence[object]]], str]


def tables(
    results: Callable[[str], list[dict[str, Any]]], where: Callable[[Mapping[str, Any]], str], markdown: Markdown
) -> dict[str, Callable[[], str]]:
    """By name, as benchmarks/report.py has them; `where` says on which machine a result was measured."""
    return {
        "fastptm_traces": lambda: _traces(results("fastptm_traces")[-1]["rows"], markdown),
        "fastptm_best": lambda: _best(results("fastptm_traces")[-1]["rows"], markdown),
        "fastptm_switch": lambda: _switch(results("fastptm_switch")[-1], where, markdown),
        "fastptm_compress": lambda: _compress(results("fastptm_compress"), markdown),
        "fastptm_instances": lambda: _instances(results("fastptm_instances"), where, markdown),
        "pets_throughput": lambda: "\n\n".join(
            f"{shape}. {_pets(result, where, markdown)}" for shape, result in _of_shapes(results("pets_throughput"))
        ),
        "pets_batching": lambda: "\n\n".join(
            f"{shape}, {result['config']['queries']} queries. {_batching(result, where, markdown)}"
            for shape, result in _of_shapes(results("pets_batching"))
        ),
        "pets_batching_cuts": lambda: _batching_cuts(_of_shapes(results("pets_batching")), markdown),
        "pets_streams": lambda: _pets_streams(results("pets_streams")[-1], where, markdown),
        "pets_memory": lambda: _pets_memory(_of_shapes(results("pets_throughput")), markdown),
    }


# ---- FastPTM -------------------------------------------------------------------------------------------------------

_METRICS = ("total_s", "overtimes", "late", "switches", "mean_s", "p99_s")
_PUBLISHED = ("round-robin", "omls")
_OURS = ("omls-guard", "kind-batches")


def _traces(rows: list[Row], markdown: Markdown) -> str:
    """Total seconds, overtimes and switches, of the traces for which the authors' logs are there."""
    systems = ("omls, logged", "omls", "round-robin, logged", "round-robin", *_OURS)
    body = [
        [trace, instances, *(_three(of.get(system)) for system in systems)]
        for (_, trace, instances), of in _of_traces(rows).items()
        if "omls, logged" in of
    ]
    return markdown(["trace", "instances", *systems], body)


def _three(row: Row | None) -> str:
    return "-" if row is None else f"{row['total_s']:.1f} · {row['overtimes']} · {row['switches']}"


def _best(rows: list[Row], markdown: Markdown) -> str:
    """Over all traces, by metric: how often which of ours is best, and how it stands to the best published one."""
    every = list(_of_traces(rows).values())
    body: list[list[object]] = []
    for name in _METRICS:
        best = [_better(of, name) for of in every]
        worse = sum(
            of[mine][name] > 1.03 * min(of[p][name] for p in _PUBLISHED) for of, mine in zip(every, best, strict=True)
        )
        full = [
            of["round-robin, full loading"][name] / max(of[mine][name], 1) for of, mine in zip(every, best, strict=True)
        ]
        counts = [best.count(policy) for policy in _OURS]
        body.append(
            [
                name.removesuffix("_s"),
                len(every),
                *counts,
                worse,
                f"{sorted(full)[len(full) // 2]:.1f}x",
                f"{max(full):.1f}x",
            ]
        )
    header = ["metric", "cases", *(f"best: {policy}" for policy in _OURS), "worse than published by over 3 %"]
    return markdown([*header, "full loading in turn to ours, median", "most"], body)


def _better(of: Mapping[str, Row], metric: str) -> str:
    """Which of ours."""
    numbers = {policy: of[policy][metric] for policy in _OURS}
    return min(numbers, key=numbers.__getitem__)


def _of_traces(rows: list[Row]) -> dict[tuple[object, ...], dict[str, Row]]:
    cases: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["set"], row["trace"], row["instances"]), {})[row["system"]] = row
    return cases


def _switch(result: Row, where: Callable[[Mapping[str, Any]], str], markdown: Markdown) -> str:
    header = ["shape", "what", "MiB", "median ms", "p25", "p75", "full, fair, to this"]
    body = [
        [
            row["shape"],
            row["system"],
            round(row["bytes"] / 2**20),
            row["p50_ms"],
            row["p25_ms"],
            row["p75_ms"],
            f"{row['fair_to_this']}x",
        ]
        for row in result["rows"]
    ]
    return where(result) + markdown(header, body)


def _instances(found: Sequence[Row], where: Callable[[Mapping[str, Any]], str], markdown: Markdown) -> str:
    """The newest result of each shape."""
    header = ["trace", "instances", "what", "total s", "waited over 3 s", "answered after 3 s", "loads", "ms a load"]
    names = ("trace", "instances", "system", "total_s", "overtimes", "late", "switches", "switch_ms", "mean_s", "p99_s")
    parts = []
    for _, result in _of_shapes(found):
        config = result["config"]
        title = (
            f"{config['shape']}, {config['kinds']} models, {config['requests']} requests of {config['items']} inputs"
        )
        body = [["-" if row[name] is None else row[name] for name in names] for row in result["rows"]]
        parts.append(f"{title}. {where(result)}{markdown([*header, 'mean s', 'p99 s'], body)}")
    return "\n\n".join(parts)


def _compress(results: list[dict[str, Any]], markdown: Markdown) -> str:
    """Every tenant next to the whole model, of the newest result of each set."""
    body: list[list[object]] = []
    for rows in {result["rows"][0]["set"]: result["rows"] for result in results}.values():
        (whole,) = (row["accuracy"] for row in rows if row["system"] == "whole")
        for row in rows:
            shares = [f"{row['accuracy']:.1%}", f"{100 * (row['accuracy'] - whole):+.1f}", f"{row['agreement']:.1%}"]
            differ = [f"{row[name]:.2g}" for name in ("logit_max", "logit_mean")]
            body.append([row["set"], row["system"], *shares, *differ, round(row["bytes"] / 2**20, 2), row["fits"]])
    header = ["set", "tenant", "accuracy", "to whole", "agreement", "logits differ by, at most", "mean", "MiB"]
    return markdown([*header, "in the memory of one model"], body)


# ---- PetS ----------------------------------------------------------------------------------------------------------


def _pets(result: Row, where: Callable[[Mapping[str, Any]], str], markdown: Markdown) -> str:
    """Queries/s by tasks, next to one task, and what the tasks' own work takes of the time."""
    cells: dict[tuple[str, int], dict[str, Row]] = {}
    for row in result["rows"]:
        if row["part"] == "tasks":
            cells.setdefault((row["queries"], row["tasks"]), {})[row["system"]] = row
    body: list[list[object]] = []
    for (queries, tasks), of in cells.items():
        speeds = {name: row["requests_per_s"] for name, row in of.items()}
        ours: list[object] = ["-", "-", "-"]
        if "vbert" in of:
            own = 1 - speeds["vbert"] / speeds["bare backbone"] if "bare backbone" in of else 0.0
            ours = [speeds["vbert"], f"{of['vbert']['to_one_task']:.2f}x", f"{own:.0%}"]
        others = [speeds.get(name, "-") for name in ("full models in turn", "full models, parallel")]
        body.append([queries, tasks, *ours, *others])
    header = ["queries a task", "tasks", "queries /s", "to one task", "tasks' own work", "full models in turn /s"]
    return where(result) + markdown([*header, "parallel /s"], body)


def _pets_memory(found: Sequence[tuple[str, Row]], markdown: Markdown) -> str:
    body = [
        [shape, round(row["task_bytes"] / 2**20, 2), round(row["model_bytes"] / 2**20, 1), f"{row['models_to_tasks']}x"]
        for shape, result in found
        for row in result["rows"]
        if row["part"] == "memory"
    ]
    return markdown(["shape", "MiB a task", "MiB a full model", "tasks in the memory of one model"], body)


_BASELINE = "fixed, padded"


def _batching(result: Row, where: Callable[[Mapping[str, Any]], str], markdown: Markdown) -> str:
    """Queries/s of every strategy to those of fixed batches with padding, by pool, and which has most."""
    pools = _of_pools(result["rows"])
    systems = [name for name in next(iter(pools.values())) if name != _BASELINE]
    body = [
        [
            *pool,
            of[_BASELINE]["requests_per_s"],
            *(f"{of[name]['to_fixed']:.2f}x" for name in systems),
            max(of, key=lambda name: float(of[name]["requests_per_s"])),
        ]
        for pool, of in pools.items()
    ]
    return where(result) + markdown(["tasks", "std", f"{_BASELINE}, queries /s", *systems, "most"], body)


def _batching_cuts(found: Sequence[tuple[str, Row]], markdown: Markdown) -> str:
    """Launches, tokens computed for each that was asked for, and milliseconds of cutting. Packed batches have the
    launches of padded ones and no padding."""
    body: list[list[object]] = []
    names = dict.fromkeys(row["system"] for _, result in found for row in result["rows"])
    systems = [name for name in names if name.endswith("padded") or name.startswith("filled")]
    for shape, result in found:
        for pool, of in _of_pools(result["rows"]).items():
            body.append([shape, *pool, *(_cut(of[name]) if name in of else "-" for name in systems)])
    return markdown(["shape", "tasks", "std", *(name.split(",")[0] for name in systems)], body)


def _cut(row: Row) -> str:
    return f"{row['launches']} · {row['padding']:.2f} · {row['scheduling_ms']:.1f}"


def _of_pools(rows: list[Row]) -> dict[tuple[object, ...], dict[str, Row]]:
    pools: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        pools.setdefault((row["tasks"], row["std"]), {})[row["system"]] = row
    return pools


def _pets_streams(result: Row, where: Callable[[Mapping[str, Any]], str], markdown: Markdown) -> str:
    """Queries/s on one stream, and on others next to that."""
    cells: dict[tuple[int, int], dict[str, Row]] = {}
    for row in result["rows"]:
        cells.setdefault((row["tenants"], row["lengths"]), {})[row["system"]] = row
    others = [name for name in next(iter(cells.values())) if name != "1 stream"]
    body = [
        [tasks, length, of["1 stream"]["requests_per_s"], *(f"{of[name]['to_one_stream']:.2f}x" for name in others)]
        for (tasks, length), of in cells.items()
    ]
    return where(result) + markdown(["tasks", "tokens a query", "queries /s, 1 stream", *others], body)


def _of_shapes(found: Sequence[Row]) -> list[tuple[str, Row]]:
    """The newest result of each shape."""
    return list({result["config"]["shape"]: result for result in found}.items())
