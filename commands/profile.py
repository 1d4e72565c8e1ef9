"""`vbert profile`: measure the cost model of this machine and one backbone, where `vbert serve` finds it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.output import add_json_flag, show

if TYPE_CHECKING:
    from runtime.cost import CostModel

__all__ = ["add_flags", "run"]

_NOISY = 0.1  # median spread


def add_flags(parser: argparse.ArgumentParser) -> None:
    from runtime.flags import add_flag

    add_flag(parser, "backbone", required=True, help="transformers folder of the backbone", metavar="FOLDER")
    parser.add_argument("--out", help="file to write (default: in the user's cache folder)", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="seconds instead of a minute, and fewer points")
    add_flag(parser, "store", help="folder on the disk that modules are loaded from", metavar="DIR")
    add_flag(parser, "device", default="auto", help="as of vbert serve", metavar="TEXT")
    add_flag(parser, "dtype", default="auto", help="as of vbert serve", metavar="TEXT")
    add_flag(parser, "compute-threads", default=0, type=int, help="as of vbert serve", metavar="N")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> None:
    from runtime.config import EngineConfig
    from runtime.profile_file import cache_folder, make_folder, profile_path, write_profile
    from training.progress import progress_bar

    config = EngineConfig(**{name: getattr(args, name) for name in ("backbone", "device", "dtype", "compute_threads")})
    folder = Path(args.out).parent if args.out else cache_folder(os.environ)
    make_folder(folder)
    with progress_bar() as progress:
        cost, seconds = _measure(config, Path(args.store or folder), args.quick, progress)
    path = Path(args.out) if args.out else profile_path(folder, cost.conditions)
    write_profile(path, cost)
    show(_report(cost, path, seconds), as_json=args.json)


def _measure(config: Any, folder: Path, quick: bool, progress: Any) -> tuple[CostModel, float]:
    from runtime.clock import MonotonicClock
    from runtime.lanes import use_one_heap
    from runtime.own_profile import lane_counts
    from runtime.profiler import FULL, QUICK, Profiler
    from vbert.formats import read_backbone
    from vbert.model import Model

    use_one_heap()  # as a server does
    backbone, clock = read_backbone(config.backbone), MonotonicClock()
    begin_s = clock.now_s()
    cost = Profiler(
        backbone=backbone,
        model=Model.load(backbone, config.dtype, config.device),
        folder=folder,
        thread_counts=lane_counts(config),
        effort=QUICK if quick else FULL,
        clock=clock,
        progress=progress,
    ).run()
    return cost, clock.now_s() - begin_s


def _report(cost: CostModel, path: Path, seconds: float) -> dict[str, Any]:
    """What was measured in short; the file has every point."""
    from dataclasses import asdict

    points = {name: curve.points[-1] for name, curve in cost.curves.items()}
    return {
        "path": str(path),
        **asdict(cost.conditions),
        "seconds": round(seconds, 1),
        "points": sum(len(curve.points) for curve in cost.curves.values()),
        "noise": round(cost.noise, 4),
        "noisy": cost.noise > _NOISY,
        "largest_ms": {f"{name} x{point.size}": round(point.seconds * 1e3, 3) for name, point in points.items()},
    }
