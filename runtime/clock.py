"""The only module that reads time. Everything else is given a `Clock`, so tests run in virtual time."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "MonotonicClock", "wall_time_ns"]


class Clock(Protocol):
    def now_s(self) -> float:
        """Seconds from an arbitrary start, never going back."""
        ...


class MonotonicClock:
    def now_s(self) -> float:
        return time.monotonic()


def wall_time_ns() -> int:
    """Nanoseconds since 1970, to compare with the times of files."""
    return time.time_ns()
