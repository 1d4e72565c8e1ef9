"""How fast a machine was while a log was recorded, next to what a profile says of it. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["STEADY", "Pace"]

_WINDOW_S = 1.0


@dataclass(frozen=True, slots=True)
class Pace:
    """Measured seconds of batches to those told: of all of them, and of those that ended in one second of the log. A
    queue suffers more from a slow second than it gains from a fast one, which the mean does not show."""

    mean: float
    by_window: Mapping[int, float]

    @classmethod
    def of(cls, batches: Iterable[tuple[float, float, float]]) -> Pace:
        """batches: (when it ended, seconds measured, seconds told) of each; without any the pace is 1."""
        sums: dict[int, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for ended_s, measured_s, told_s in batches:
            window = int(ended_s / _WINDOW_S)
            sums[window] = (sums[window][0] + measured_s, sums[window][1] + told_s)
        told = sum(told_s for _, told_s in sums.values())
        mean = sum(measured_s for measured_s, _ in sums.values()) / told if told else 1.0
        return cls(mean, {window: measured_s / told_s for window, (measured_s, told_s) in sums.items()})

    def at(self, now_s: float) -> float:
        return self.by_window.get(int(now_s / _WINDOW_S), self.mean)


STEADY = Pace(1.0, {})
