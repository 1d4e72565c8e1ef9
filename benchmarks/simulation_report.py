"""The tables of the simulator in docs/benchmarks.md: how fast, how right, which policy wins under overload."""

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
    columns = {
        "load": "load",
        "tokens/s at most": "capacity",
        "requests": "requests",
        "measured mean ms": "measured_mean_ms",
        "simulated": "simulated_mean_ms",
        "ratio": "ratio",
        "by the line": "ratio_line",
        "by the profile": "ratio_profile",
        "slope": "slope",
        "fixed ms": "fixed_ms",
        "measured p99 ms": "measured_p99_ms",
        "p99 simulated": "simulated_p99_ms",
    }
    return markdown(list(columns), [[row.get(name, "-") for name in columns.values()] for row in rows])


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


def _case(row: Row) -> tuple[object, ...]:
    return row["load"], row["arrivals"], row["popularity"]
