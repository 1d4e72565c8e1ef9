"""Whether the engine answers: a canary request, the progress of the queue, and the lag of the event loop.

`report` computes nothing. It tells what the last canary found and how long nothing has moved. A full queue is no
illness: only wrong or failing answers, and work that does not move, make the engine unready.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from runtime.clock import Clock
from runtime.metrics import Histogram
from vbert.errors import Overloaded, VbertError

__all__ = ["Health", "Readiness"]

_LAG_INTERVAL_S = 0.025
_STALLED_S = 30.0  # several times the longest batch ever seen on a slow, shared machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """reasons: why not, empty when ready. canary: `ok`, `age_s`, `duration_s`, `error`. watchdog: `stalled_s`,
    `limit_s`, `loop_lag_p99_s`."""

    ready: bool
    reasons: tuple[str, ...]
    canary: dict[str, Any]
    watchdog: dict[str, Any]


@dataclass(slots=True, kw_only=True, eq=False)
class Health:
    """ask: sends one tiny request through the queue and checks the answer. waiting_since_s: since when something waits
    or computes without anything being finished; None when there is nothing to do."""

    ask: Callable[[], Awaitable[None]]
    waiting_since_s: Callable[[], float | None]
    loop_lag: Histogram
    clock: Clock
    _error: str | None = field(default="no canary was answered yet", init=False)
    _checked_s: float | None = field(default=None, init=False)
    _duration_s: float = field(default=0.0, init=False)

    async def canary(self) -> None:
        """One canary. An overloaded queue says nothing about health, so the last finding stands."""
        started_s = self.clock.now_s()
        try:
            await self.ask()
            self._error = None
        except Overloaded:
            return
        except VbertError as error:
            self._error = error.message
        self._checked_s = self.clock.now_s()
        self._duration_s = self._checked_s - started_s

    async def watch_loop_lag(self) -> None:
        """Measure how late the event loop wakes a task, until cancelled."""
        while True:
            due_s = self.clock.now_s() + _LAG_INTERVAL_S
            await asyncio.sleep(_LAG_INTERVAL_S)
            self.loop_lag.observe(max(0.0, self.clock.now_s() - due_s))

    @property
    def error(self) -> str | None:
        """What was wrong with the last canary that was answered; None when nothing was."""
        return self._error

    def report(self, refusal: VbertError | None) -> Readiness:
        """refusal: why the dispatcher admits nothing, if so."""
        now_s, since_s = self.clock.now_s(), self.waiting_since_s()
        stalled_s = 0.0 if since_s is None else now_s - since_s
        reasons = []
        if refusal is not None:
            reasons.append(f"{refusal.code}: {refusal.message}")
        if self._error is not None:
            reasons.append(f"canary: {self._error}")
        if stalled_s > _STALLED_S:
            reasons.append(f"watchdog: work waits and nothing was finished for {stalled_s:.1f} s")
        age_s = None if self._checked_s is None else now_s - self._checked_s
        return Readiness(
            ready=not reasons,
            reasons=tuple(reasons),
            canary={
                "ok": self._error is None,
                "age_s": age_s,
                "duration_s": self._duration_s,
                "error": self._error,
            },
            watchdog={
                "stalled_s": stalled_s,
                "limit_s": _STALLED_S,
                "loop_lag_p99_s": self.loop_lag.snapshot().p99,
            },
        )
