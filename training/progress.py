"""How long work tells how far it is: a callback, the bar that draws it in a terminal, and lines for a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Progress", "progress_bar", "silent"]

Progress = Callable[[str, int, int], None]  # what is going on, steps done, steps in all
_LINE_EVERY_S = 60.0


def silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A `rich` bar where standard error is a terminal, one line a stage, a stage being what stands before the colon;
    else a line a minute."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        stages = {}

        def show(what: str, done: int, total: int) -> None:
            stage = what.split(":")[0]
            if stage not in stages:
                stages[stage] = bar.add_task(what, total=total)
            bar.update(stages[stage], description=what, completed=done, total=total)

        yield show


def _lines() -> Progress:
    told_s = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal told_s
        if time.monotonic() - told_s >= _LINE_EVERY_S:
            told_s = time.monotonic()
            print(f"{what} ({done} of {total})", file=sys.stderr, flush=True)

    return tell
