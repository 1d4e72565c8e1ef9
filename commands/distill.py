"""`vbert distill`: make a skip backbone of a plain one, or adapt one to a domain."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict

from commands.output import add_json_flag, show

__all__ = ["add_flags", "run"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as in commands/train.py
    from runtime.flags import add_flags
    from training.distill_config import DistillConfig

    parser.add_argument("--recipe", help="TOML file with settings; flags override them", metavar="FILE")
    add_flags(parser, DistillConfig)
    add_json_flag(parser)


def run(args: argparse.Namespace) -> None:
    from runtime.flags import given
    from training.config import read_recipe
    from training.distill_config import DistillConfig
    from training.distill_lower_layers import run
    from training.progress import progress_bar

    settings = (read_recipe(args.recipe, DistillConfig) if args.recipe else {}) | given(args, DistillConfig)
    with progress_bar() as progress:
        report = run(DistillConfig(**settings), progress=progress)
    show(asdict(report) | {"path": str(report.path)}, as_json=args.json)
