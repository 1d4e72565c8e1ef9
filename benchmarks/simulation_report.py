"""The tables of the simulator in docs/benchmarks.md (how fast, how right, which policy wins under overload), and those
of FastPTM's and PetS's experiments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

__all__ = ["tables"]

Row = Mapping[str, Any]
Markdown = Callable[[Sequence[str], Iterable[Sequence[object]]], str]

_JUDGED = ("late", "goodput", "jain", "p50_ms", "p99_ms", "p99_with_misses_ms", "mean_ms", "weighted_turnaround")
_MORE_IS_BETTER = ("goodput", "jain")
_DEFAULT = "fair"


def tables(
    results: Callable[[str], list[dict[str, Any]]], where: Callable[[Mapping[str, Any]], str], markdown: Markdown
) -> dict[str, Callable[[], str]]:
    """By name, as benchmarks/report.py has them; `where` says on which machine a result was measured."""

    def newest(part: str, table: Callable[[list[Row], Markdown], str]) -> Callable[[], str]:
        def render() -> str:
            found = [each for each in results("simulation") if any(row["part"] == part for row in each["rows"])]
            if not found:
                return f"Not measured yet: `vbert bench simulation --parts {part} --append`, then `make tables`."
            result = found[-1]
            return where(result) + table([row for row in result["rows"] if row["part"] == part], markdown)

        return render

    return {
        "simulation_speed": newest("speed", _speed),
        "simulation_cost": newest("cost", _cost),
        "simulation_replay": newest("replay", _replay),
        "simulation_overload": newest("overload", _overload),
        "simulation_others": newest("overload", _others),
        "fastptm_traces": lambda: _traces(results("fastptm_traces")[-1]["rows"], markdown),
        "fastptm_best": lambda: _best(results("fastptm_traces")[-1]["rows"], markdown),
        "pets_throughput": lambda: _pets(results("pets_throughput")[-1], where, markdown),
        "pets_memory": lambda: _pets_memory(results("pets_throughput")[-1]["rows"], markdown),
        "fastptm_switch": lambda: _switch(results("fastptm_switch")[-1], where, markdown),
        "fastptm_compress": lambda: _compress(results("fastptm_compress"), markdown),
    }


def _speed(rows: list[Row], markdown: Markdown) -> str:
    body = [[row["policy"], row["load"], f"{row['requests']:,}", row["answered"], row["seconds"]] for row in rows]
    return markdown(["policy", "load", "requests", "answered in time", "seconds"], body)


def _cost(rows: list[Row], markdown: Markdown) -> str:
    header = ["points", "differ by, median", "p90", "batches", "error, median", "p90", "told to measured, median"]
    names = ("points", "repeat_p50", "repeat_p90", "batches", "error_p50", "error_p90", "bias")
    return markdown(header, [[_percent(name, row[name]) for name in names] for row in rows])


def _percent(name: str, value: float) -> object:
    return f"{value:.1%}" if name.startswith(("repeat", "error")) else value


def _replay(rows: list[Row], markdown: Markdown) -> str:
    header = ["load", "requests", "measured mean ms", "simulated", "ratio", "measured p99 ms", "simulated"]
    means = ("measured_mean_ms", "simulated_mean_ms", "ratio")
    names = ("load", "requests", *means, "measured_p99_ms", "simulated_p99_ms", "to_profile")
    return markdown([*header, "batches to profile"], [[row.get(name, "-") for name in names] for row in rows])


def _overload(rows: list[Row], markdown: Markdown) -> str:
    """One line a policy and kind of traffic."""
    body = [[*_case(row), row["policy"], *(row[name] for name in _JUDGED)] for row in rows]
    header = ["load", "arrivals", "tenants", "policy", "late", "goodput /s", "jain", "p50 ms", "p99 ms"]
    return markdown([*header, "p99 with misses ms", "mean ms", "weighted turnaround"], body)


def _others(rows: list[Row], markdown: Markdown) -> str:
    """Where another policy is better than the default, and by how much."""
    body: list[list[object]] = []
    for case in dict.fromkeys(_case(row) for row in rows):
        of = {row["policy"]: row for row in rows if _case(row) == case}
        for name in _JUDGED:
            numbers = {policy: row[name] for policy, row in of.items() if row[name] is not None}
            best = (max if name in _MORE_IS_BETTER else min)(numbers, key=numbers.__getitem__)
            if numbers[best] != numbers[_DEFAULT]:
                ratio = numbers[_DEFAULT] / numbers[best] if numbers[best] else float("inf")
                body.append([*case, name.removesuffix("_ms"), numbers[_DEFAULT], best, numbers[best], f"{ratio:.2f}x"])
    return markdown(["load", "arrivals", "tenants", "metric", _DEFAULT, "the best", "has", "ratio"], body)


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
        ours, speeds = of["vbert"], {name: row["requests_per_s"] for name, row in of.items()}
        own = 1 - speeds["vbert"] / speeds["bare backbone"] if "bare backbone" in of else 0.0
        others = [speeds.get(name, "-") for name in ("full models in turn", "full models, parallel")]
        body.append([queries, tasks, speeds["vbert"], f"{ours['to_one_task']:.2f}x", f"{own:.0%}", *others])
    header = ["queries a task", "tasks", "queries /s", "to one task", "tasks' own work", "full models in turn /s"]
    return where(result) + markdown([*header, "parallel /s"], body)


def _pets_memory(rows: list[Row], markdown: Markdown) -> str:
    body = [
        [round(row["task_bytes"] / 2**20, 2), round(row["model_bytes"] / 2**20, 1), f"{row['models_to_tasks']}x"]
        for row in rows
        if row["part"] == "memory"
    ]
    return markdown(["MiB a task", "MiB a full model", "tasks in the memory of one model"], body)


def _case(row: Row) -> tuple[object, ...]:
    return row["load"], row["arrivals"], row["popularity"]
