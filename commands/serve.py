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
    from runtime.logs import log_to_stderr
    from serve import configs, run

    engine_config, http_config = configs(args)
    for name in ("backbone", "store"):
        if not getattr(engine_config, name):
            raise Wrong(f"--{name} is not given; see vbert serve --help")

    def ready(url: str) -> None:
        print(json.dumps({"url": url, "pid": os.getpid()}) if args.json else f"serving on {url}", flush=True)

    log_to_stderr()
    run(engine_config, http_config, on_ready=ready)
