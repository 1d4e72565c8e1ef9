"""Records as text for people: a dict as one line a field, several as a table. Pure; prints nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

__all__ = ["printable", "record", "table"]


def table(records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A header and one line a record; columns as wide as they must be, none ever cut."""
    rows = [[column.removesuffix("_s").removeprefix("num_") for column in columns]]
    rows += [[_cell(name, item[name]) for name in columns] for item in records]
    return _aligned(rows)


def record(fields: Mapping[str, Any]) -> str:
    return _aligned([[name, _cell(name, value)] for name, value in fields.items()])


def printable(text: str) -> str:
    """Names and labels come from files of strangers: no escape sequence of theirs may reach a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _cell(name: str, value: Any) -> str:
    if value in (None, "", (), [], {}) and not isinstance(value, bool):
        return "-"
    if name == "created_s":
        return datetime.fromtimestamp(value).isoformat(" ", "seconds")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith("bytes"):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell("", item) for item in value)
    return printable(json.dumps(value) if isinstance(value, Mapping) else str(value))
