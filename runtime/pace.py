"""How fast a machine was while a log was recorded, next to what a profile says of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["STEADY", "Pace"]

_WINDOW_S = 1.0


@dataclass(frozen=True, slots=True)
class Pace:
    """Measured seconds of batches: a line over those told, by slope and fixed_s, times a ratio for each second of the
    log. A queue suffers more from a slow second than it gains from a fast one, which a mean does not show."""

    slope: float
    fixed_s: float
    by_window: Mapping[int, float]

    @classmethod
    def of(cls, batches: Sequence[tuple[float, float, float]]) -> Pace:
        """batches: (when it ended, seconds measured, seconds told) of each; without any they take what was told."""
        if not batches:
            return STEADY
        ended_s, measured_s, told_s = np.array(batches).T
        slope, fixed_s = _line(told_s, measured_s)
        windows, of_window = np.unique((ended_s / _WINDOW_S).astype(np.int64), return_inverse=True)
        measured = np.bincount(of_window, measured_s)
        fitted = np.bincount(of_window, slope * told_s + fixed_s)
        return cls(slope, fixed_s, dict(zip(windows.tolist(), (measured / fitted).tolist(), strict=True)))

    @property
    def mean(self) -> Pace:
        """The line alone."""
        return Pace(self.slope, self.fixed_s, {})

    def seconds(self, told_s: float, now_s: float) -> float:
        """Of a batch that begins then."""
        ratio = self.by_window.get(int(now_s / _WINDOW_S), 1.0) if self.by_window else 1.0
        return ratio * (self.slope * told_s + self.fixed_s)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Least squares, neither slope nor y at 0 below 0."""
    variance = x.var()
    slope = ((x * y).mean() - x.mean() * y.mean()) / variance if variance > 0 else -1.0
    fixed = y.mean() - slope * x.mean()
    if slope < 0 or fixed < 0:
        slope, fixed = (x * y).sum() / (x * x).sum(), 0.0
    return float(slope), float(fixed)


STEADY = Pace(1.0, 0.0, {})
