"""What does a busy neighbour cost? `vbert bench neighbour [--json]`

Clients in a closed loop on an engine of two cores, while another process keeps one core busy all the time, or comes and
goes, or is not there. Every setting of threads has an engine in a process of its own; all but the measured one are
stopped (SIGSTOP), since threads that wait actively would be neighbours themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.machine import Neighbours, commit, describe
from benchmarks.report import output_flags, publish
from benchmarks.workload import SHAPES, write_backbone
from vbert.errors import ConfigError

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Setting:
    """threads: as EngineConfig.compute_threads. wait: OMP_WAIT_POLICY, None for what the OpenMP library does."""

    threads: int
    wait: str | None


SETTINGS = {
    "vbert serve": Setting(0, "PASSIVE"),
    "vbert in process": Setting(0, None),
    "one thread": Setting(1, None),
    "two threads, passive": Setting(2, "PASSIVE"),
    "two threads, default": Setting(2, None),
    "two threads, active": Setting(2, "ACTIVE"),
}
# What the other process does all the time, in Python. The last one: half a second busy, half a second idle.
NEIGHBOURS = {
    "quiet": None,
    "busy": "while True: pass",
    "comes and goes": "import time\nwhile True:\n t = time.time()\n while time.time() < t + .5: pass\n time.sleep(.5)",
}


@dataclass(slots=True)
class Seen:
    """What the clients of one setting saw beside one neighbour, over all rounds."""

    latencies: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """spread: (p75 - p25) / p50 of the rounds."""
        p25, p50, p75 = (float(q) for q in np.percentile(self.rates, (25, 50, 75)))
        middle, late = (round(float(q) * 1e3, 3) for q in np.percentile(self.latencies, (50, 99)))
        return {
            "requests_per_s": round(p50, 1),
            "p50_ms": middle,
            "p99_ms": late,
            "spread": round((p75 - p25) / p50, 4),
            "rounds": len(self.rates),
            "threads": self.threads,
        }


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    if len(os.sched_getaffinity(0)) != 2:
        raise ConfigError("this is about two cores; run it with `taskset --cpu-list 0,1`")
    watch = Neighbours()
    with tempfile.TemporaryDirectory() as scratch:
        backbone = write_backbone(args.shape, Path(scratch), seed=0)
        seen = _measure(backbone, args)
    rows = [
        {"system": name, "concurrency": clients, "neighbour": neighbour, "shape": args.shape} | cell.row()
        for (name, clients, neighbour), cell in seen.items()
    ]
    quiet = {(row["system"], row["concurrency"]): row for row in rows if row["neighbour"] == "quiet"}
    for row in rows:
        rate = quiet[row["system"], row["concurrency"]]["requests_per_s"]
        row["to_quiet"] = round(row["requests_per_s"] / rate, 4)
    config = {name: getattr(args, name) for name in ("seconds", "rounds", "tenants")}
    result = {
        "benchmark": "neighbour",
        "machine": describe() | watch.report(),  # all processes of ours have ended, so their time counts as ours
        "commit": commit(),
        "config": config,
        "rows": rows,
    }
    publish(result, args)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vbert bench neighbour", description=__doc__)
    output_flags(parser)
    parser.add_argument("--shape", choices=SHAPES, default="12x384")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seconds", type=float, default=3.0, help="of one setting beside one neighbour in one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 64], metavar="N", help="clients")
    parser.add_argument("--tenants", type=int, default=16, help="LoRA tenants that the requests are for")
    return parser.parse_args(argv)


def _measure(backbone: Path, args: argparse.Namespace) -> Mapping[tuple[str, int, str], Seen]:
    """One turn of every setting beside every neighbour a round, in rotating order."""
    seen = {case: Seen() for case in itertools.product(args.settings, args.concurrency, NEIGHBOURS)}
    with contextlib.ExitStack() as stack, Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("neighbour", total=len(seen) * args.rounds)
        engines = {name: stack.enter_context(_engine(SETTINGS[name], backbone, args)) for name in args.settings}
        others = {name: stack.enter_context(_stopped(code)) for name, code in NEIGHBOURS.items() if code}
        for done in range(args.rounds):
            cells = list(seen)[done % len(seen) :] + list(seen)[: done % len(seen)]
            for case in cells:
                name, clients, neighbour = case
                bar.update(task, description=f"{name} x{clients}, {neighbour}")
                with _running(engines[name]), _running(others.get(neighbour)):
                    _turn(engines[name], clients, args.seconds, seen[case])
                bar.advance(task)
    return seen


def _turn(engine: subprocess.Popen[str], clients: int, seconds: float, seen: Seen) -> None:
    _ask(engine, clients, seconds / 4)  # the engine may adapt, and what was stopped wakes up
    answer = _ask(engine, clients, seconds)
    seen.latencies += answer["latencies_s"]
    seen.rates.append(len(answer["latencies_s"]) / answer["elapsed_s"])
    seen.threads.append(answer["threads"])


def _ask(engine: subprocess.Popen[str], clients: int, seconds: float) -> dict[str, Any]:
    assert engine.stdin is not None
    engine.stdin.write(f"{clients} {seconds}\n")
    engine.stdin.flush()
    return _answer(engine)


def _answer(engine: subprocess.Popen[str]) -> dict[str, Any]:
    assert engine.stdout is not None
    line = engine.stdout.readline()
    if not line:
        raise ConfigError("an engine ended before it answered; its message is above")
    answer: dict[str, Any] = json.loads(line)
    return answer


@contextlib.contextmanager
def _engine(setting: Setting, backbone: Path, args: argparse.Namespace) -> Iterator[subprocess.Popen[str]]:
    """A started engine, stopped until it is its turn."""
    unset = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    if setting.wait:
        environment["OMP_WAIT_POLICY"] = setting.wait
    options = {"backbone": backbone, "threads": setting.threads, "tenants": args.tenants}
    command = [sys.executable, "-m", "benchmarks.one_engine", *(f"--{key}={value}" for key, value in options.items())]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdin=pipe, stdout=pipe) as process:
        try:
            _answer(process)
            process.send_signal(signal.SIGSTOP)
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@contextlib.contextmanager
def _stopped(code: str) -> Iterator[subprocess.Popen[str]]:
    """A neighbour, stopped until it is its turn."""
    with subprocess.Popen([sys.executable, "-c", code], text=True) as process:
        try:
            process.send_signal(signal.SIGSTOP)
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def _running(process: subprocess.Popen[str] | None) -> Iterator[None]:
    if process is None:
        yield
        return
    process.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGSTOP)


if __name__ == "__main__":
    main()
