"""The `vbert` command: serve, tenants, train, distill, ngrams, profile, simulate, bench, keys. Each is a module of
commands/, imported when it is run.

Results go to stdout, as a table or with --json as one JSON value; progress and errors go to stderr. An error is one
line and exit code 2, also where a part of a bulk import was refused.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from commands.output import Wrong, complain

__all__ = ["main"]

_COMMANDS = {
    "serve": "serve the tenants of a store over HTTP",
    "tenants": "add, list, switch and remove tenants",
    "train": "train a tenant on a frozen backbone from jsonl",
    "distill": "make a skip backbone of a plain one, or adapt one to a domain",
    "ngrams": "build, merge, prune and look into tables of n-grams for a skip backbone",
    "profile": "measure what this machine takes for what a server does",
    "simulate": "put requests, recorded or made up, through policies in virtual time",
    "bench": "run a benchmark by name; its own flags follow",
    "keys": "make an API key for `vbert serve --keys FILE`",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 refused or failed with one line on stderr, 130 interrupted, 141 nobody reads the output."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv is None and arguments[:1] in (["serve"], ["profile"]):  # the process is ours, not a caller's
            from runtime.wait_policy import suit_machine

            suit_machine(arguments[1:])
        args = _parser(arguments).parse_args(arguments)
        code: int | None = args.run(args)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter complains when it flushes at exit
        return 141
    except (Wrong, OSError) as error:
        return complain(f"{error}; check the path and its rights" if getattr(error, "filename", None) else str(error))
    except Exception as error:
        from vbert.errors import VbertError

        if isinstance(error, VbertError):
            return complain(error.message)
        raise  # our own bug: the traceback is what helps


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        from runtime.flags import ENVIRONMENT_HELP

        super().__init__(epilog=ENVIRONMENT_HELP, **options)

    def error(self, message: str) -> NoReturn:
        raise Wrong(f"{message}; see {self.prog} --help")


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Only the command that is run gets its flags, so `vbert --help` imports next to nothing."""
    parser = _Parser(prog="vbert", description="Serve many tenants on one frozen encoder.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:])
        if arguments[:1] == [name]:
            module = importlib.import_module(f"commands.{name}")
            command.set_defaults(run=getattr(module, "run", None))  # the sub-commands of `tenants` have their own
            module.add_flags(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
