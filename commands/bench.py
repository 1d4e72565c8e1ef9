"""`vbert bench NAME`: run a benchmark of a checkout. Each has its own flags and prints its own result."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from commands.output import Wrong

__all__ = ["add_flags", "run"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="without it, the names are listed")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")


def run(args: argparse.Namespace) -> int:
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    places = {path.stem: path for where in (folder, folder / "experiments") for path in sorted(where.glob("*.py"))}
    modules = {name: _module(path) for name, path in places.items() if "\ndef main(argv" in path.read_text("utf-8")}
    names = sorted(modules)
    if args.name is None:
        print("\n".join(names))
        return 0
    if args.name not in names:
        raise Wrong(f"benchmark {args.name!r} is not one of {', '.join(names) or 'none'} in {folder}")
    code: int | None = importlib.import_module(modules[args.name]).main(args.arguments)
    return code or 0


def _module(path: Path) -> str:
    package = "benchmarks" if path.parent.name == "benchmarks" else f"benchmarks.{path.parent.name}"
    return f"{package}.{path.stem}"
