"""How long a batch takes: what a profile says, if there is one, corrected by the batches before it. Pure.

Without a profile: seconds = fixed + tokens * per token, learned. With one: its seconds times a ratio, learned.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Throughput"]

_KEEP = 0.9  # weight of the past at each batch: about the last ten count, so a busy neighbour is noticed soon


class Throughput:
    """Recent batches, older ones counting less."""

    def __init__(self, predict: Callable[[int], float] | None = None) -> None:
        """predict: seconds of a batch of so many tokens on this machine when it is quiet, such as
        `CostModel.forward_s`."""
        self._predict = predict
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._predicted = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        sums = (self._weight, self._x, self._y, self._xx, self._xy, self._predicted)
        predicted = self._predict(tokens) if self._predict else 0.0
        news = (1.0, float(tokens), seconds, float(tokens) ** 2, tokens * seconds, predicted)
        self._weight, self._x, self._y, self._xx, self._xy, self._predicted = (
            _KEEP * old + new for old, new in zip(sums, news, strict=True)
        )

    def seconds(self, tokens: int) -> float | None:
        """Expected time of a batch of so many tokens; without a profile None before the first observation."""
        if self._predict:
            return self._predict(tokens) * self.ratio
        return self._fitted(tokens) if self._weight else None

    @property
    def ratio(self) -> float:
        """Measured seconds over those of the profile, large batches counting more; 1 before the first one."""
        return self._y / self._predicted if self._predicted else 1.0

    def tokens_per_s(self, batch_tokens: int) -> float | None:
        """Speed of batches of that size."""
        seconds = self.seconds(batch_tokens)
        return batch_tokens / seconds if seconds else None

    def _fitted(self, tokens: int) -> float:
        """Least squares."""
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x**2
        # batches of one size tell nothing about the fixed part; then time is taken to be proportional
        slope = (
            (self._xy / self._weight - mean_x * mean_y) / variance if variance > 1e-3 * mean_x**2 else mean_y / mean_x
        )
        slope = min(max(slope, 0.0), mean_y / mean_x)
        return mean_y + slope * (tokens - mean_x)
