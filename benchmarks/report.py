"""Tables of the documents, from results and from code: `make tables`. Nobody writes them by hand.

A document marks a place with `<!-- table:NAME -->` and `<!-- /table -->`; what lies between is replaced by the table of
that name. `tests/test_docs.py` fails when a document holds anything else.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks import density_report, experiments_report, simulation_report, skip_report
from vbert.errors import ConfigError

__all__ = ["DOCUMENTS", "RESULTS", "TABLES", "NotMeasured", "fill", "latest", "output_flags", "publish", "results"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"(<!-- table:([a-z_]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_BARE, _MIXED, _OURS, _PLAIN = "transformers bare", "peft mixed batch", "vbert", "vbert without modules"

Row = Mapping[str, Any]


class NotMeasured(Exception):
    """The benchmark has no recorded result yet."""


def results(benchmark: str) -> list[dict[str, Any]]:
    """The recorded results of a benchmark, the newest last."""
    path = RESULTS / f"{benchmark}.jsonl"
    if not path.exists():
        raise NotMeasured(f"Not measured yet: `vbert bench {benchmark} --append`, then `make tables`.")
    return [json.loads(line) for line in path.read_text().splitlines()]


def latest(benchmark: str) -> dict[str, Any]:
    return results(benchmark)[-1]


def fill(text: str) -> str:
    """A document with every marked table rendered again. Raises KeyError for an unknown name."""
    return _BLOCK.sub(lambda match: f"{match[1]}{_render(match[2])}\n{match[3]}", text)


def _render(name: str) -> str:
    try:
        return TABLES[name]()
    except NotMeasured as absent:
        return str(absent)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# ---- results -----------------------------------------------------------------------------------------------------


def multitenant_headline() -> str:
    """64 tenants: requests/s of ours and of the peers, and the ratios; one table, the newest result of each shape."""
    header = ["shape", "dtype", "lengths", "bare backbone", "PEFT mixed batch", "PEFT one by one", "**vbert**"]
    newest = _newest_by_shape()
    places = "".join(f"{result['rows'][0]['shape']}: {_where(result)}" for result in newest)
    body = [row for result in newest for row in _headline_rows(result)]
    return places + markdown([*header, "to bare", "to PEFT mixed"], body)


def _headline_rows(result: Mapping[str, Any]) -> Iterator[list[object]]:
    for (shape, dtype, lengths, tenants), systems in _cells(result["rows"]):
        if tenants == 64:
            speed = {name: row["requests_per_s"] for name, row in systems.items()}
            numbers = [_number(speed.get(name)) for name in (_BARE, _MIXED, "peft one by one", _OURS)]
            yield [shape, dtype, lengths, *numbers, *(_ratio(speed, _OURS, peer) for peer in (_BARE, _MIXED))]


def multitenant() -> str:
    """Every row."""
    return _by_shape(_rows_of)


def _by_shape(table: Callable[[Mapping[str, Any]], str]) -> str:
    return "\n\n".join(table(result) for result in _newest_by_shape())


def _newest_by_shape() -> list[dict[str, Any]]:
    """The newest result of each shape, with the rows of that shape."""
    newest: dict[str, dict[str, Any]] = {}
    for result in results("multitenant"):
        for shape in {row["shape"] for row in result["rows"]}:
            newest[shape] = result | {"rows": [row for row in result["rows"] if row["shape"] == shape]}
    return [newest[shape] for shape in sorted(newest)]


def _rows_of(result: Mapping[str, Any]) -> str:
    columns = ("shape", "dtype", "lengths", "tenants", "system", "requests_per_s", "p50_ms", "p99_ms", "spread")
    body = [[row[column] for column in columns] for row in result["rows"]]
    return _where(result) + markdown([column.replace("_", " ") for column in columns], body)


def multitenant_mix() -> str:
    """What modules of every kind cost, against the same batch without any."""
    return _by_shape(_mix_of)


def _mix_of(result: Mapping[str, Any]) -> str:
    body = []
    for (shape, dtype, lengths, tenants), systems in _cells(result["rows"]):
        speed = {name: row["requests_per_s"] for name, row in systems.items()}
        values = [_number(speed[_PLAIN]), _number(speed[_OURS]), _ratio(speed, _OURS, _PLAIN)]
        body.append([shape, dtype, lengths, tenants, *values])
    header = ["shape", "dtype", "lengths", "tenants", "without modules", "with", "ratio"]
    return _where(result) + markdown(header, body)


def serving() -> str:
    result = latest("serving")
    columns = ("system", "concurrency", "requests_per_s", "p50_ms", "p99_ms")
    body = [[row[column] for column in columns] for row in result["rows"]]
    return _where(result) + markdown([column.replace("_", " ") for column in columns], body)


def half_linear() -> str:
    """Milliseconds of a batch whose number of tokens comes for the first time, and again, and memory by such a one."""
    result = latest("half_linear")
    body = [
        [row["texts"], row["system"], f"{row['first_ms']:.2f}", f"{row['again_ms']:.2f}", f"{row['grown_mib']:.2f}"]
        for row in result["rows"]
    ]
    header = ["texts", "products", "first, ms", "again, ms", "MiB each"]
    return _where(result).replace("; requests/s", f"; {result['config']['backbone']}") + markdown(header, body)


def overlap() -> str:
    """Milliseconds a batch with the lanes off and on, what the lanes did meanwhile, and how much of it nobody saw."""
    result = latest("overlap")
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in result["rows"]:
        case = (row["shape"], row["kind"], f"{row['budget']:.0%}", row["system"])
        cells.setdefault(case, {})[row["lanes"]] = row
    body = []
    for case, lanes in cells.items():
        on, hidden = lanes["on"], lanes["on"]["hidden"]
        shown = [lanes["off"]["p50_ms"], on["p50_ms"], on["rows_ms"], on["modules_ms"], on["wait_ms"]]
        body.append([*case, on["uploads_per_batch"], *shown, "-" if hidden is None else f"{hidden:.0%}"])
    header = [
        "shape",
        "modules",
        "room",
        "system",
        "uploads",
        "off, ms",
        "on, ms",
        "rows, ms",
        "modules, ms",
        "waits, ms",
    ]
    return _where(result).replace("; requests/s", "; a batch") + markdown([*header, "hidden"], body)


def neighbour() -> str:
    """By clients and setting: requests/s on a quiet machine, and what is left of them beside a neighbour."""
    result = latest("neighbour")
    cells: dict[tuple[int, str], dict[str, Row]] = {}
    for row in result["rows"]:
        cells.setdefault((row["concurrency"], row["system"]), {})[row["neighbour"]] = row
    beside = [name for name in next(iter(cells.values())) if name != "quiet"]
    body = [
        [
            clients,
            system,
            _number(rows["quiet"]["requests_per_s"]),
            *(f"{rows[name]['to_quiet']:.2f}x" for name in beside),
        ]
        for (clients, system), rows in cells.items()
    ]
    return _where(result) + markdown(["clients", "setting", "quiet", *beside], body)


def training_quality() -> str:
    """Test accuracy of both sides, and of a linear probe on the frozen backbone."""
    result = latest("training_quality")
    cells: dict[tuple[str, int], dict[str, Row]] = {}
    for row in result["rows"]:
        cells.setdefault((row["set"], row["seed"]), {})[row["system"]] = row
    body = [
        [name, seed, next(iter(systems.values()))["linear_probe"], *(f"{row['test']:.4f}" for row in systems.values())]
        for (name, seed), systems in cells.items()
    ]
    where = (
        f"{result['machine']['cpu']}, torch {result['machine']['versions']['torch']}, commit {result['commit']}.\n\n"
    )
    return where + markdown(["set", "seed", "linear probe", *next(iter(cells.values()))], body)


def equality() -> str:
    """By backbone, at worst: how far its tenants are from the original libraries and the dense reference."""
    result = latest("equality")
    backbones: dict[str, list[Row]] = {}
    for row in result["rows"]:
        backbones.setdefault(row["backbone"], []).append(row)
    body = []
    for backbone, rows in backbones.items():
        worst = {name: max(row.get(name, 0.0) for row in rows) for name in ("fp32_to_original", "fp32_alone")}
        cosine = next(row["bf16_least_cosine"] for row in rows if row["case"] == "last hidden states")
        share = max(row.get("bf16_share", 0.0) for row in rows)
        body.append(
            [backbone, len(rows), *(f"{value:.1e}" for value in worst.values()), f"{cosine:.4f}", f"{share:.2f}"]
        )
    versions = result["machine"]["versions"]
    where = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "adapters"))
    header = ["backbone", "cases", "fp32, to the original", "fp32, mixed to alone", "bf16, least cosine", "bf16, share"]
    return f"{where}, commit {result['commit']}.\n\n" + markdown(header, body)


def _cells(rows: Iterable[Row]) -> Iterable[tuple[tuple[Any, ...], dict[str, Row]]]:
    """Rows by (shape, dtype, lengths, tenants), then by system, in the order they were measured."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cell = (row["shape"], row["dtype"], row["lengths"], row["tenants"])
        cells.setdefault(cell, {})[row["system"]] = row
    return cells.items()


def _where(result: Mapping[str, Any]) -> str:
    """The line above a table: on what, when at which commit, and whether neighbours were busy. Where the machine
    multiplies bfloat16 itself, that is the dtype unless the table says another."""
    machine = result["machine"]
    native = ", native bfloat16" if machine.get("native_bfloat16") else ""
    noise = f", {machine['other_cores']} cores busy with other work" if machine.get("noisy") else ""
    return (
        f"{machine['cpu']}{native}, {machine['cores']} cores, {machine['torch_threads']} threads, "
        f"torch {machine['versions']['torch']}, commit {result['commit']}{noise}; requests/s.\n\n"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(speed: Mapping[str, float], ours: str, theirs: str) -> str:
    return f"{speed[ours] / speed[theirs]:.2f}x" if theirs in speed else "-"


# ---- code --------------------------------------------------------------------------------------------------------


def engine_options() -> str:
    from runtime.config import EngineConfig

    return _options(EngineConfig)


def http_options() -> str:
    from runtime.http.config import HttpConfig

    return _options(HttpConfig)


def train_options() -> str:
    from training.config import TrainConfig

    return _options(TrainConfig)


def distill_options() -> str:
    from training.distill_config import DistillConfig

    return _options(DistillConfig)


def _options(config: Any) -> str:
    """One row a field of a config dataclass: its flag, default and meaning."""
    rows = [
        (f"`--{field.name.replace('_', '-')}`", f"`{field.default!r}`", field.metadata["help"])
        for field in fields(config)
    ]
    return markdown(["option", "default", "meaning"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "multitenant_headline": multitenant_headline,
    "multitenant": multitenant,
    "multitenant_mix": multitenant_mix,
    "serving": serving,
    "half_linear": half_linear,
    "overlap": overlap,
    "neighbour": neighbour,
    "training_quality": training_quality,
    "equality": equality,
    "engine_options": engine_options,
    "http_options": http_options,
    "train_options": train_options,
    "distill_options": distill_options,
    **density_report.tables(results, _where, markdown),
    **skip_report.tables(results, _where, markdown),
    **simulation_report.tables(results, _where, markdown),
    **experiments_report.tables(results, _where, markdown),
}


# ---- output of one run -------------------------------------------------------------------------------------------

_LOAD = ("lengths", "tenants", "queries", "tasks", "std", "concurrency")
_PARAMETERS = ("set", "shape", "dtype", *_LOAD, "budget", "lanes", "neighbour")
_RATIOS = ("to_quiet", "to_one_stream", "to_fixed")
_SPEED = ("requests_per_s", *_RATIOS, "launches", "padding", "p50_ms", "p99_ms", "spread")
_MEASURED = (*_SPEED, "accuracy", "agreement", "fits")


def output_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `publish` reads."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--append", action="store_true", help="append the object to benchmarks/results/")
    parser.add_argument("--quiet-only", action="store_true", help="fail when other processes used the CPU meanwhile")


def publish(result: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Print a result, and keep it if asked to. Raises ConfigError for a noisy one with --quiet-only."""
    machine = result["machine"]
    if machine["noisy"] and args.quiet_only:
        cores = machine["other_cores"]
        raise ConfigError(f"other processes used {cores} cores meanwhile; stop them, or drop --quiet-only")
    if args.append:
        with (RESULTS / f"{result['benchmark']}.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
    if args.json:
        print(json.dumps(result))
    else:
        _print_table(result)


def _print_table(result: Mapping[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    known = {name for row in result["rows"] for name in row}
    names = ["system", *(name for name in (*_PARAMETERS, *_MEASURED) if name in known)]
    columns = [name.replace("_", " ").replace(" per s", "/s") for name in names]
    table = Table(*columns, title=result["benchmark"], box=SIMPLE_HEAD)
    for row in result["rows"]:
        what = row.get("system") or row.get("policy") or row.get("part")
        table.add_row(str(what), *(str(row.get(name, "-")) for name in names[1:]))
    console = Console()
    console.width = max(console.width, 120)  # a wrapped number cannot be read
    console.print(table)
    if result["machine"]["noisy"]:
        console.print(f"noisy: other processes used {result['machine']['other_cores']} cores meanwhile", style="yellow")


def main() -> None:
    for path in DOCUMENTS:
        text = path.read_text()
        if (filled := fill(text)) != text:
            path.write_text(filled)
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
