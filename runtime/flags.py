"""Command-line flags from the fields of a config dataclass, each also as an environment variable: --port, VBERT_PORT.

Called from `main` functions only; nothing else reads flags or the environment.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import Field, fields
from itertools import chain
from typing import Any

__all__ = ["ENVIRONMENT_HELP", "add_flag", "add_flags", "given"]

ENVIRONMENT_HELP = "Settings are also environment variables: --max-batch-tokens is VBERT_MAX_BATCH_TOKENS."
_METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "A,B"}


def add_flag(parser: argparse._ActionsContainer, name: str, *, help: str, **options: Any) -> None:
    """One `--name`; its default is the environment variable if that is set and not empty."""
    value = os.environ.get("VBERT_" + name.replace("-", "_").upper())
    if value:
        options |= {"default": value, "required": False}  # a default that is a string goes through `type`, too
    parser.add_argument(f"--{name}", help=help.replace("%", "%%"), **options)


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """One flag a field, with its help and default. A flag nobody gave leaves no attribute: see `given`."""
    for each in fields(config):
        default = "" if each.default in (None, "", 0, ()) else f" (default: {_shown(each.default)})"
        add_flag(
            parser,
            each.name.replace("_", "-"),
            help=each.metadata["help"] + default,
            default=argparse.SUPPRESS,
            **_parsing(each),
        )


def given(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """The fields of `config` that a flag or an environment variable sets."""
    values = {each.name: getattr(args, each.name) for each in fields(config) if hasattr(args, each.name)}
    # of "A,B" "C", words of one flag, each a tuple: see `_parsing`
    return {name: tuple(chain(*value)) if isinstance(value, list) else value for name, value in values.items()}


def _parsing(each: Field[Any]) -> dict[str, Any]:
    """How argparse reads the value. Values are checked by the config itself, whatever they came from."""
    kind = str if each.default is None else type(each.default)
    if kind is tuple:
        parsing = {"type": _items(each.metadata.get("of", str)), "metavar": _METAVARS[tuple]}
        return parsing | ({"nargs": "+"} if each.metadata.get("files") else {})  # a shell writes *.txt as several words
    return {"type": kind, "metavar": _METAVARS[kind]}


def _items(of: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(of(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers; write them as 3,4") from None

    return parse


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
