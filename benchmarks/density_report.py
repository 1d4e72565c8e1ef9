"""The tables of `density` in docs/benchmarks.md. A newer result replaces older rows of the same shape, kind and number
of tenants; peers are shown with what was measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

__all__ = ["tables"]

Row = Mapping[str, Any]
_CASE = ("shape", "kind", "tenants")


def tables(
    results: Callable[[str], list[dict[str, Any]]],
    where: Callable[[Mapping[str, Any]], str],
    markdown: Callable[[Sequence[str], Iterable[Sequence[object]]], str],
) -> dict[str, Callable[[], str]]:
    """By name, as benchmarks/report.py has them; `where` says on which machine a result was measured."""

    def table(
        rows_of: Callable[[list[Row]], tuple[list[str], list[list[object]]]],
        counts: Callable[[Row], bool] = lambda _: True,
        asked_all: bool = False,
    ) -> Callable[[], str]:
        """counts: rows without which a result is not for this table. asked_all: results whose first round asked every
        tenant go before newer ones in which it did not."""

        def render() -> str:
            newest: dict[tuple[Any, ...], Any] = {}
            every = results("density")
            for result in sorted(every, key=_asked_all) if asked_all else every:
                newest |= {tuple(_case(row)): result for row in result["rows"] if counts(row)}
            used = {id(result): result for result in newest.values()}
            rows = [
                row for result in used.values() for row in result["rows"] if newest.get(tuple(_case(row))) is result
            ]
            return "".join(where(result) for result in used.values()) + markdown(*rows_of(sorted(rows, key=_sorting)))

        return render

    return {
        "density_registration": table(_registration),
        "density_serving": table(_serving, asked_all=True),
        "density_first": table(_first),
        "density_memory": table(_memory),
        "density_peers": table(_peers, lambda row: "kib_per_tenant" in row),
    }


def _asked_all(result: Mapping[str, Any]) -> bool:
    """Or was measured before there were first rounds of some."""
    return all(row.get("first_round", row["tenants"]) >= row["tenants"] for row in result["rows"])


def _registration(rows: list[Row]) -> tuple[list[str], list[list[object]]]:
    body = [
        [*_case(row), row["seconds"], row["plain_write_s"], f"{row['seconds'] / row['plain_write_s']:.2f}x"]
        for row in _of(rows, "registration")
    ]
    return [*_CASE, "seconds", "plain files", "ratio"], body


def _serving(rows: list[Row]) -> tuple[list[str], list[list[object]]]:
    """One line a budget: requests/s by popularity, and what Zipf's law gives next to everything in memory."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in _of(rows, "vbert"):
        if not isinstance(row["budget"], str):
            cells.setdefault((*_case(row), row["budget"]), {})[row["popularity"]] = row
    body: list[list[object]] = []
    for (*case, budget), seen in cells.items():
        zipf, full = seen["zipf"], cells.get((*case, 1.0), {}).get("zipf")
        ratio = "-" if full is None else f"{zipf['requests_per_s'] / full['requests_per_s']:.2f}x"
        patterns = ("first round", "distinct", "uniform", "zipf", "identical")
        speeds = [seen[name]["requests_per_s"] if name in seen else "-" for name in patterns]
        latency = [zipf["p50_ms"], zipf["p99_ms"], zipf["load_p50_ms"] or "-", zipf["start_s"]]
        body.append([*case, f"{budget:.0%}", *speeds, ratio, f"{zipf['hit_rate']:.2f}", *latency])
    header = [
        "first round /s",
        "distinct /s",
        "uniform /s",
        "zipf /s",
        "identical /s",
        "zipf to all in memory",
        "zipf hits",
    ]
    return [*_CASE, "in memory", *header, "zipf p50 ms", "p99 ms", "load ms", "start s"], body


def _first(rows: list[Row]) -> tuple[list[str], list[list[object]]]:
    body = [[*_case(row), row["where"], row["p50_ms"], row["p99_ms"]] for row in _of(rows, "vbert, one at a time")]
    return [*_CASE, "module is in", "p50 ms", "p99 ms"], body


def _memory(rows: list[Row]) -> tuple[list[str], list[list[object]]]:
    body = [
        [*_case(row), row["budget"], row["rss_anon_mib"], row["rss_file_mib"], row["start_s"], row["requests_per_s"]]
        for row in _of(rows, "vbert")
        if isinstance(row["budget"], str) and row["popularity"] == "zipf"
    ]
    return [*_CASE, "budget", "RssAnon MiB", "RssFile MiB", "start s", "zipf /s"], body


def _peers(rows: list[Row]) -> tuple[list[str], list[list[object]]]:
    body: list[list[object]] = []
    kib = {tuple(_case(row)): row["module_bytes"] / row["tenants"] / 1024 for row in _of(rows, "registration")}
    for row in rows:
        ours = row["system"] == "vbert" and row["kind"] == "lora" and row["popularity"] == "zipf"
        if ours and not isinstance(row["budget"], str):
            numbers = [row["requests_per_s"], row["p50_ms"], f"{kib[tuple(_case(row))]:.1f}"]
            body.append([*_case(row), f"vbert, {row['budget']:.0%} in memory", *numbers])
        elif "kib_per_tenant" in row:
            body.append([*_case(row), row["system"], row["requests_per_s"], row["p50_ms"], row["kib_per_tenant"]])
    return [*_CASE, "system", "requests /s", "p50 ms", "KiB a tenant"], body


def _sorting(row: Row) -> tuple[Any, ...]:
    return str(row["shape"]), str(row["kind"]), int(row["tenants"])


def _of(rows: list[Row], system: str) -> list[Row]:
    return [row for row in rows if row["system"] == system]


def _case(row: Row) -> list[Any]:
    return [row[name] for name in _CASE]
