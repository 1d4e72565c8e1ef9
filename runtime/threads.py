"""How many cores the next batch should use, learned from the batches before it. Pure: no threads, no clock.

On two cores a batch on two threads is nearly twice as fast as on one, until a neighbour (event loop, tokenizer, another
process) keeps one of them busy: then every operator waits for its slower half, and it is several times slower, while
one thread does not notice. Nobody tells us which case it is, so each count is tried, and tried again now and then.
"""

from __future__ import annotations

__all__ = ["ThreadChoice"]

_KEEP = 0.6  # of the past: one collapsed batch is enough to change
_FIRST_RETRY, _LAST_RETRY = 16, 256  # batches until the other counts are tried again; doubles while nothing changes


class ThreadChoice:
    """The fastest of a few thread counts, for each size of batch (by powers of two) on its own."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        """counts: to choose from, the one to begin with first."""
        self._counts = counts
        self._sizes: dict[int, _Size] = {}

    @classmethod
    def up_to(cls, cores: int) -> ThreadChoice:
        """All cores, half of them where that is more than one, or one."""
        return cls(tuple(dict.fromkeys((cores, max(1, cores // 2), 1))))

    def choose(self, tokens: int) -> int:
        return self._size(tokens).choose()

    def observe(self, count: int, tokens: int, seconds: float) -> None:
        self._size(tokens).observe(count, seconds / max(1, tokens))

    def _size(self, tokens: int) -> _Size:
        return self._sizes.setdefault(tokens.bit_length(), _Size(self._counts))


class _Size:
    """Batches of nearly one size. `cost`: recent seconds a token, by thread count."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        self._counts = counts
        self._cost: dict[int, float] = {}
        self._tries: list[int] = list(counts)
        self._retry_after = _FIRST_RETRY
        self._batches = 0
        self._best = counts[0]

    def choose(self) -> int:
        if self._tries:
            return self._tries.pop(0)
        self._batches += 1
        if self._batches >= self._retry_after and len(self._counts) > 1:
            self._batches, self._retry_after = 0, min(2 * self._retry_after, _LAST_RETRY)
            self._tries = [count for count in self._counts if count != self._best]
            return self._tries.pop(0)
        return self._best

    def observe(self, count: int, cost: float) -> None:
        old = self._cost.get(count, cost)
        self._cost[count] = min(_KEEP * old + (1 - _KEEP) * cost, 1.2 * cost)  # good news is believed at once
        best = min(self._cost, key=self._cost.__getitem__)
        if best != self._best:
            self._best, self._batches, self._retry_after = best, 0, _FIRST_RETRY
