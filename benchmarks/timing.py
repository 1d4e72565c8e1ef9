"""Interleaved timing: every system runs once a round, in a rotating order, so that drift hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Timing", "best_of", "interleave"]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each round of one system."""

    seconds: tuple[float, ...]

    def row(self, requests: int) -> dict[str, Any]:
        """The numbers of one result row. spread: (p75 - p25) / p50."""
        p25, p50, p75, p95, p99 = (float(q) for q in np.percentile(self.seconds, (25, 50, 75, 95, 99)))
        return {
            "requests_per_s": round(requests / p50, 1),
            "p50_ms": round(p50 * 1e3, 3),
            "p95_ms": round(p95 * 1e3, 3),
            "p99_ms": round(p99 * 1e3, 3),
            "spread": round((p75 - p25) / p50, 4),
            "rounds": len(self.seconds),
        }


def interleave(
    systems: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 2, tick: Callable[[], None] = lambda: None
) -> dict[str, Timing]:
    """Time each system `rounds` times after `warmup` runs that do not count. `tick` is called after every round."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    names = list(systems)
    for done in range(warmup + rounds):
        for name in names[done % len(names) :] + names[: done % len(names)]:
            begin = time.perf_counter()
            systems[name]()
            if done >= warmup:
                seconds[name].append(time.perf_counter() - begin)
        tick()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def best_of(candidates: Mapping[int, Callable[[], Any]], *, rounds: int = 2) -> int:
    """The key of the fastest candidate by its median: how a peer gets its best batching."""
    timings = interleave({str(key): run for key, run in candidates.items()}, rounds=rounds, warmup=1)
    return min(candidates, key=lambda key: float(np.median(timings[str(key)].seconds)))
