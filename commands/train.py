"""`vbert train`: train a tenant on a frozen backbone, then add it to a store or write it to a file."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from commands.output import Wrong, add_json_flag, show
from commands.target import add_target_flags, check_name, put, target, where

__all__ = ["add_flags", "run"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    # Before torch is loaded, which the settings do. Threads that spin while they wait for each other make a run beside
    # a busy neighbour several times as long: 33 to 42 s in place of 7 to 16 s for 256 rows on two cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from runtime.flags import add_flags
    from training.config import TrainConfig

    parser.add_argument("name", nargs="?", metavar="NAME", help="tenant of --store or --server; not needed with --out")
    parser.add_argument("--recipe", help="TOML file with settings; flags override them", metavar="FILE")
    add_flags(parser, TrainConfig)
    add_target_flags(parser)
    add_json_flag(parser)


def run(args: argparse.Namespace) -> None:
    from runtime.flags import given
    from training.progress import progress_bar
    from training.train_peft import TrainConfig, read_recipe, run
    from vbert.formats.transformers_folder import backbone_name

    settings = (read_recipe(args.recipe) if args.recipe else {}) | given(args, TrainConfig)
    to_store = args.name is not None and any(where(args))
    if not to_store and (args.store or args.server or not settings.get("out")):
        raise Wrong("the result has no place; give NAME and --store DIR or --server URL, or give --out FILE")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        config = TrainConfig(**{"out": f"{folder}/tenant.safetensors"} | settings)
        if to_store and config.backbone:
            check_name(args.name, backbone_name(Path(config.backbone)))
        store = stack.enter_context(target(args, create=True)) if to_store else None
        with progress_bar() as progress:
            report = asdict(run(config, progress=progress)) | {"path": settings.get("out")}
        if store is not None:
            report = put(store, args.name, Path(config.out).read_bytes()) | report
    show(report, as_json=args.json)
