"""The figures of benchmarks/experiments/, as the papers draw them. `vbert bench plots NAME FILE`: the newest results.

An experiment says with `panels(rows)` what its figure shows, and takes `--plot FILE` to draw what it has just measured.
matplotlib is an extra, and is imported only where something is to be drawn.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import NotMeasured, results
from vbert.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EXPERIMENTS", "Panel", "draw", "main", "plot_flag"]

EXPERIMENTS = sorted(path.stem for path in (Path(__file__).parent / "experiments").glob("[!_]*.py"))
_SUFFIXES = (".png", ".svg", ".pdf")
_COLOURS = 10  # that matplotlib has before it begins again


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One set of axes. series: by its name, y of every x; x stand side by side in the order they come in. bars: grouped
    by x, else lines. scale: of y, as matplotlib names it."""

    title: str
    x: str
    y: str
    series: Mapping[str, Mapping[Any, float]]
    bars: bool = True
    scale: str = "linear"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="vbert bench plots", description=__doc__)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("file", type=_file)
    args = parser.parse_args(argv)
    try:
        every = results(args.name)
    except NotMeasured as absent:
        raise ConfigError(str(absent)) from absent
    newest = {(each["config"].get("shape"), each["rows"][0].get("set")): each["rows"] for each in every}
    of_shape: dict[str | None, list[dict[str, Any]]] = {}
    for (shape, _), rows in newest.items():
        of_shape.setdefault(shape, []).extend(rows)
    panels = importlib.import_module(f"benchmarks.experiments.{args.name}").panels
    named = [(shape, panel) for shape, rows in of_shape.items() for panel in panels(rows)]
    draw(args.file, [replace(each, title=f"{shape}: {each.title}") if shape else each for shape, each in named])


def plot_flag(parser: argparse.ArgumentParser) -> None:
    """Whether there is matplotlib is known before anything is measured."""
    help_text = f"draw the figure of the paper, {', '.join(_SUFFIXES)} (matplotlib)"
    parser.add_argument("--plot", type=_file, metavar="FILE", help=help_text)


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """One below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _draw(axes, panel)
    figure.savefig(path)


def _file(text: str) -> Path:
    path = Path(text)
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"a plot cannot be written to {text!r}; end its name in {', '.join(_SUFFIXES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("a plot needs matplotlib; install vbert[plots], or draw none") from error
    return path


def _draw(axes: Axes, panel: Panel) -> None:
    from matplotlib import colormaps

    places = list(dict.fromkeys(x for values in panel.series.values() for x in values))
    width = 0.8 / len(panel.series)
    if len(panel.series) > _COLOURS:
        axes.set_prop_cycle(color=colormaps["tab20"](range(20)))  # of each colour two, side by side
    for k, (name, values) in enumerate(panel.series.items()):
        at = [places.index(x) for x in values]
        if panel.bars:
            shift = (k - (len(panel.series) - 1) / 2) * width
            axes.bar([place + shift for place in at], list(values.values()), width, label=name)
        else:
            axes.plot(at, list(values.values()), marker="o", label=name)
    axes.set_xticks(range(len(places)), [str(x) for x in places])
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y, yscale=panel.scale)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(axis="y", alpha=0.3)
