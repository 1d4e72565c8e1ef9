"""The tables of skipped layers in docs/benchmarks.md: what they save (`skip`), what students learn (`distillation`),
what it loses (`skip_quality`), what looking n-grams up takes (`look_up`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

__all__ = ["tables"]

_EPOCHS = 3  # of tenants, where a table does not say another

Row = Mapping[str, Any]
Results = Callable[[str], list[dict[str, Any]]]
Markdown = Callable[[Sequence[str], Iterable[Sequence[object]]], str]


def tables(
    results: Results, where: Callable[[Mapping[str, Any]], str], markdown: Markdown
) -> dict[str, Callable[[], str]]:
    """By name, as benchmarks/report.py has them; `where` says on which machine a result was measured."""

    def skip() -> str:
        """The newest of each backbone and choice of systems."""
        newest: dict[tuple[str, ...], Mapping[str, Any]] = {}
        for result in results("skip"):
            config = result["config"]
            dtype = config.get("dtype", "float32")  # the first results are of machines without another
            newest[config["backbone"], dtype, *config.get("systems", ()), *config.get("streams", ())] = result
        return "\n\n".join(
            f"**{backbone}**, {dtype}, {where(result)}{_skip(result, markdown)}"
            for (backbone, dtype, *_), result in sorted(newest.items())
        )

    return {
        "skip": skip,
        "distillation": lambda: _distillation(results("distillation"), markdown),
        "skip_quality": lambda: _quality(results("skip_quality"), markdown),
        "look_up": lambda: _look_up(results("look_up")[-1], where, markdown),
    }


def _skip(result: Mapping[str, Any], markdown: Markdown) -> str:
    """By stream and clients: requests/s of each way as a multiple of the plain one, and the share of hits."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in result["rows"]:
        cases.setdefault((row["set"], row["stream"], row["concurrency"]), {})[row["system"]] = row
    ways = [way for way in dict.fromkeys(way for each in cases.values() for way in each) if way != "plain"]
    body = []
    for case, by_way in cases.items():
        bases = {way: by_way[row.get("base", "plain")] for way, row in by_way.items()}
        speeds = {way: _speed(row, bases[way]) for way, row in by_way.items()}
        hits = {way: row.get("left") or row["hit_rate"] for way, row in by_way.items()}
        cells = [
            f"{speeds[way]:.2f}x" + (f" ({hits[way]:.2f})" if hits[way] else "") if way in speeds else "-"
            for way in ways
        ]
        body.append([*case, by_way["plain"]["requests_per_s"], f"{by_way['plain']['p50_ms']:.1f}", *cells])
    ways = [f"{way}, to plain" if way == "classifier" else way for way in ways]
    return markdown(["set", "stream", "clients", "plain /s", "ms", *ways], body) + "\n\n" + _memory(result["rows"])


def _memory(rows: Sequence[Row]) -> str:
    """What the stores of each way held in the end, and the process that has an engine for each."""
    kept: dict[str, float] = {}
    for row in rows:
        kept[row["system"]] = max(kept.get(row["system"], 0.0), row["kept_mib"])
    told = ", ".join(f"{way} {most:.1f}" for way, most in kept.items() if most)
    anon, file = (max(row[name] for row in rows) for name in ("rss_anon_mib", "rss_file_mib"))
    process = f"The process with all these engines: RssAnon {anon}, mapped files {file} MiB."
    return f"MiB kept: {told or 'nothing'}. {process}"


def _speed(row: Row, base: Row) -> float:
    """As a multiple of the base, round by round where that was recorded."""
    ratio: float = row["to_base"][0] if "to_base" in row else row["requests_per_s"] / base["requests_per_s"]
    return ratio


def _look_up(result: Mapping[str, Any], where: Callable[[Mapping[str, Any]], str], markdown: Markdown) -> str:
    """Million keys a second, and the parts of a batch that skips."""
    of = {what: [row for row in result["rows"] if row["what"] == what] for what in ("keys", "batch", "miss")}
    keys = [
        [row["set"], row["depth"], *(f"{row['found'][kept]:.2f}" for kept in "3210"), row["mkeys_per_s"], row["spread"]]
        for row in of["keys"]
    ]
    ms = [(row, {what: row["ms"].get(what) for what in ("look_up", "enter", "batch", "plain")}) for row in of["batch"]]
    batches = [
        [row["system"], *("-" if each is None else f"{each:.1f}" for each in parts.values()), f"{row['share']:.1%}"]
        for row, parts in ms
    ]
    header = ["set", "depth", "tri-grams", "bi-grams", "uni-grams", "nothing", "M keys/s", "spread"]
    parts = markdown(["backbone", "look-up ms", "enter ms", "batch ms", "plain ms", "share"], batches)
    entries = f"{of['keys'][0]['entries']:,} entries.\n\n" if of["keys"] else ""
    misses = [[row["system"], *(f"{each:.2f}" for each in row["ms"].values())] for row in of["miss"]]
    told = "\n\n" + markdown(["backbone", *(f"{n} missing, ms" for n in (1, 2, 4, 8)), "a layer, ms"], misses)
    return where(result) + entries + markdown(header, keys) + "\n\n" + parts + (told if misses else "")


def _distillation(found: Iterable[Mapping[str, Any]], markdown: Markdown) -> str:
    """By backbone, student and tokens: the errors left at the merge, at the last layer and of the pooled state."""
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for result in found:
        for row in result["rows"]:
            cells.setdefault((row["backbone"], row["system"], row["kind"], row["tokens"] // 1000), []).append(row)
    body = []
    for (backbone, system, kind, thousands), rows in sorted(cells.items(), key=lambda cell: cell[0]):
        seeds = {row["seed"]: row for row in rows}.values()  # the newest of each
        ends = [list(row["after"].values()) for row in seeds], [list(row["after_backoff"].values()) for row in seeds]
        errors = [" ".join(f"{each[i]:.3f}" for each in end) for end in ends for i in (0, -2, -1)]
        begins = " ".join(f"{list(row['before'].values())[-1]:.3f}" for row in seeds)
        minutes = fmean(row["seconds"] for row in seeds) / 60
        body.append([backbone, system, kind, f"{thousands}k", f"{minutes:.1f}", begins, *errors])
    header = ["backbone", "student", "kind", "tokens", "minutes", "pooled before", "merge", "last layer", "pooled"]
    return markdown([*header, "merge, shortened", "last layer, shortened", "pooled, shortened"], body)


def _quality(found: Iterable[Mapping[str, Any]], markdown: Markdown) -> str:
    """By backbone, system, what it learnt from, steps and path: the metric of each set, mean of the seeds, and how far
    they are from the teacher's on average."""
    cells: dict[tuple[str, ...], dict[str, dict[int, float]]] = {}
    for result in found:
        config = result["config"]
        for row in result["rows"]:
            about = (_budget(config), _steps(config), config.get("dtype", "float32"))
            longer = f", {config['epochs']} epochs" if config["epochs"] != _EPOCHS else ""
            key: tuple[str, ...] = (config["backbone"], row["system"] + longer, *about, row["path"])
            cells.setdefault(key, {}).setdefault(row["set"], {})[row["seed"]] = row["value"]
    sets = sorted({name for of_set in cells.values() for name in of_set})
    students = list(dict.fromkeys(key[:-1] for key in cells))
    body = []
    for key, of_set in sorted(cells.items(), key=lambda cell: students.index(cell[0][:-1])):
        teacher = cells[key[0], "teacher", "-", "-", key[4], "plain"]
        # A student is compared seed by seed, on the seeds and sets that its teacher was measured with.
        apart = [
            100 * fmean(value - teacher[name][seed] for seed, value in values.items() if seed in teacher[name])
            for name, values in of_set.items()
            if {*values} & {*teacher.get(name, {})}
        ]
        shown = [f"{100 * fmean(of_set[name].values()):.1f}" if name in of_set else "-" for name in sets]
        seeds = max(len(values) for values in of_set.values())
        body.append([*key, seeds, *shown, f"{fmean(apart):+.1f} ({len(apart)})" if apart else "-"])
    return markdown(
        ["backbone", "system", "tokens", "steps", "trained in", "path", "seeds", *sets, "to teacher (sets)"], body
    )


def _steps(config: Mapping[str, Any]) -> str:
    """Whether a tenant of several paths got as many steps for each as alone, or for all of them together."""
    if "steps" in config:
        return "each"
    distilled = config["distilled"]
    return "shared" if distilled is not None and distilled["kind"] not in ("full", "window") else "-"


def _budget(config: Mapping[str, Any]) -> str:
    """What a student learnt from."""
    distilled = config["distilled"]
    return "-" if distilled is None else f"{distilled['tokens']:,}"
