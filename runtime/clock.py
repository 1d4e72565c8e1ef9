"""The only module that reads time. Everything else is given a `Clock`, so tests run in virtual time."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "MonotonicClock"]


class Clock(Protocol):
    def now_s(self) -> float:
        """Seconds from an arbitrary start, never going back."""
        ...


class MonotonicClock:
    def now_s(self) -> float:
        return time.monotonic()
