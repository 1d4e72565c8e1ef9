"""`vbert keys`: make an API key. The secret is shown once; the file only ever has its hash."""

from __future__ import annotations

import argparse
import os

from commands.output import add_json_flag, show

__all__ = ["add_flags", "run"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="who the key is for; queue shares are counted by it")
    parser.add_argument("--scopes", default="infer", help="of infer, admin, metrics (default: infer)", metavar="A,B")
    parser.add_argument("--tenants", default="*", help="patterns of the tenants it may use (default: *)", metavar="A,B")
    parser.add_argument("--file", help="append the key, hashed, to this file", metavar="FILE")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> None:
    from serve import make_key

    secret, key = make_key(args.name, args.scopes.split(","), args.tenants.split(","))
    if args.file:
        with os.fdopen(os.open(args.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
            file.write(key.line() + "\n")
    show({"name": key.name, "key": secret, "line": key.line()}, as_json=args.json)
