"""How far a benchmark is, for whoever watches it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

__all__ = ["track"]

T = TypeVar("T")


def track(items: Sequence[T], description: str) -> Iterable[T]:
    """The items, with a bar on a terminal. Only there rich is needed, which a GPU machine may lack."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track as with_bar

    return with_bar(items, description, console=Console(stderr=True), transient=True)
