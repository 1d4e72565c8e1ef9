"""How commands speak: results on stdout, as text or as one JSON value; errors as one line on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

__all__ = ["COLUMNS", "Wrong", "add_json_flag", "complain", "show"]

COLUMNS = ("tenant", "version", "active", "task", "kinds", "num_bytes", "created_s")  # of a list of tenants


class Wrong(Exception):
    """The command line itself is wrong."""


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON value")


def show(value: Any, *, as_json: bool = False, columns: Sequence[str] = COLUMNS) -> None:
    """A dict or dataclass, or a list of them. What a list of tenants shows stands first in a single one, too."""
    from runtime.listing import record, table

    several = isinstance(value, list)
    values = [item if isinstance(item, dict) else asdict(item) for item in (value if several else [value])]
    values = [{name: item[name] for name in COLUMNS if name in item} | item for item in values]
    if as_json:
        print(json.dumps(values if several else values[0]))
    else:
        print(table(values, columns) if several else record(values[0]))


def complain(message: str) -> int:
    """Say what is wrong; returns the exit code that goes with it."""
    from runtime.listing import printable

    print("vbert: error:", printable(" ".join(message.split())), file=sys.stderr)
    return 2
