"""`vbert serve`: the tenants of a store over HTTP, until SIGTERM."""

from __future__ import annotations

import argparse
import json
import os

from commands.output import Wrong, add_json_flag

__all__ = ["add_flags", "run"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    from runtime.config import EngineConfig
    from runtime.flags import add_flags
    from serve import HttpConfig

    add_flags(parser, EngineConfig)
    add_flags(parser, HttpConfig)
    add_json_flag(parser)


def run(args: argparse.Namespace) -> None:
    import logging

    from runtime.config import EngineConfig
    from runtime.flags import given
    from serve import HttpConfig, run

    engine_config = EngineConfig(**given(args, EngineConfig))
    for name in ("backbone", "store"):
        if not getattr(engine_config, name):
            raise Wrong(f"--{name} is not given; see vbert serve --help")

    def ready(url: str) -> None:
        print(json.dumps({"url": url, "pid": os.getpid()}) if args.json else f"serving on {url}", flush=True)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run(engine_config, HttpConfig(**given(args, HttpConfig)), on_ready=ready)
