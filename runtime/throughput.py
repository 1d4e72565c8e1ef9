"""How long a batch takes, learned from the batches before it: seconds = fixed + tokens * per token. Pure."""

from __future__ import annotations

__all__ = ["Throughput"]

_KEEP = 0.9  # weight of the past at each batch: about the last ten count, so a busy neighbour is noticed soon


class Throughput:
    """Least squares over recent batches, older ones counting less."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        sums = (self._weight, self._x, self._y, self._xx, self._xy)
        news = (1.0, float(tokens), seconds, float(tokens) ** 2, tokens * seconds)
        self._weight, self._x, self._y, self._xx, self._xy = (
            _KEEP * old + new for old, new in zip(sums, news, strict=True)
        )

    def seconds(self, tokens: int) -> float | None:
        """Expected time of a batch of so many tokens; None before the first observation."""
        if not self._weight:
            return None
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x**2
        # batches of one size tell nothing about the fixed part; then time is taken to be proportional
        slope = (
            (self._xy / self._weight - mean_x * mean_y) / variance if variance > 1e-3 * mean_x**2 else mean_y / mean_x
        )
        slope = min(max(slope, 0.0), mean_y / mean_x)
        return mean_y + slope * (tokens - mean_x)

    def tokens_per_s(self, batch_tokens: int) -> float | None:
        """Speed of batches of that size."""
        seconds = self.seconds(batch_tokens)
        return batch_tokens / seconds if seconds else None
