"""What does each kind of student learn? `vbert bench distillation --teacher NAME --students NAME=FOLDER ...`

Collects what `vbert distill` reported into one result: the errors of each state on held-out text, in units of the
teacher's variance, before and after, with whole and with shortened n-grams; students of one NAME differ in their seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import Neighbours, commit, describe
from benchmarks.report import output_flags, publish
from vbert.errors import ConfigError

__all__ = ["main"]

_SETTINGS = ("kind", "skipped", "lower", "upper", "upper_layers", "window", "seed")
_LOSSES = ("before", "after", "before_backoff", "after_backoff")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="vbert bench distillation", description=__doc__)
    output_flags(parser)
    parser.add_argument("--teacher", required=True, metavar="NAME", help="what all students learnt from")
    parser.add_argument("--students", nargs="+", required=True, metavar="NAME=FOLDER")
    args = parser.parse_args(argv)
    result = {
        "benchmark": "distillation",
        "machine": describe() | Neighbours().report(),
        "commit": commit(),
        "config": {},
        "rows": [_row(args.teacher, item) for item in args.students],
    }
    publish(result, args)


def _row(teacher: str, item: str) -> dict[str, Any]:
    name, _, folder = item.partition("=")
    path = Path(folder) / "distilled.json"
    if not folder or not path.is_file():
        raise ConfigError(f"students has {item!r}; write NAME=FOLDER, a folder of `vbert distill` that is done")
    found = json.loads(path.read_text())
    settings, report = found["settings"], found["report"]
    about = {"system": name, "backbone": teacher, "tokens": report["tokens"]}
    about |= {setting: settings[setting] for setting in _SETTINGS} | {"seconds": round(report["seconds"], 1)}
    return about | {loss: report[loss] for loss in _LOSSES}


if __name__ == "__main__":
    main()
