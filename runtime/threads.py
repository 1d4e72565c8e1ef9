"""How many cores the next batch should use, learned from the batches before it. Pure: no threads, no clock.

On two cores a batch on two threads is nearly twice as fast as on one, until a neighbour (event loop, tokenizer, another
process) keeps one of them busy: then every operator waits for its slower half, and it is several times slower, while
one thread does not notice. Nobody tells us which case it is, so each count is tried, and tried again now and then.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["ThreadChoice"]

_KEEP = 0.6  # of the past: one collapsed batch is enough to change
_FIRST_RETRY, _LAST_RETRY = 16, 1024  # batches until the other counts are tried again
_TICK_S = 1e-6  # a clock may not have moved
_COLLAPSE = 4  # times slower than another count: what everybody who waits feels


class ThreadChoice:
    """The fastest of a few thread counts, for each size of batch (by powers of two) on its own."""

    def __init__(self, counts: tuple[int, ...], on_collapse: Callable[[int, float], None] | None = None) -> None:
        """counts: to choose from, the one to begin with first. on_collapse: told once, when a batch on several threads
        was many times slower than on another count: their number, and how many times."""
        self.counts = counts
        self._on_collapse = on_collapse
        self._sizes: dict[int, _Size] = {}

    @classmethod
    def up_to(cls, cores: int, on_collapse: Callable[[int, float], None] | None = None) -> ThreadChoice:
        """All cores, half of them where that is more than one, or one."""
        return cls(tuple(dict.fromkeys((cores, max(1, cores // 2), 1))), on_collapse)

    @classmethod
    def of_lane(
        cls, compute_threads: int, cores: int, on_collapse: Callable[[int, float], None] | None = None
    ) -> ThreadChoice:
        """compute_threads: as in EngineConfig, 0 for a choice."""
        return cls((compute_threads,), on_collapse) if compute_threads else cls.up_to(cores, on_collapse)

    def choose(self, tokens: int) -> int:
        return self._size(tokens).choose()

    def observe(self, count: int, tokens: int, seconds: float) -> None:
        times = self._size(tokens).observe(count, max(seconds, _TICK_S) / max(1, tokens))
        if self._on_collapse and count > 1 and times >= _COLLAPSE:
            on_collapse, self._on_collapse = self._on_collapse, None
            on_collapse(count, times)

    def _size(self, tokens: int) -> _Size:
        return self._sizes.setdefault(tokens.bit_length(), _Size(self.counts))


class _Size:
    """Batches of nearly one size. `cost`: recent seconds a token, by thread count.

    Under a neighbour that comes and goes a try may succeed and the next batch collapse, so both a try that fails and a
    count that soon collapses make the next try rarer: by as many times as the batch was slower, at least twice.
    """

    def __init__(self, counts: tuple[int, ...]) -> None:
        self._counts = counts
        self._cost: dict[int, float] = {}
        self._tries: list[int] = list(counts)
        self._retry_after = _FIRST_RETRY
        self._waited = 0  # batches since the last try
        self._held = 0  # batches since the best count became the best
        self._best = counts[0]

    def choose(self) -> int:
        if not self._tries and self._waited >= self._retry_after:
            self._waited, self._tries = 0, [count for count in self._counts if count != self._best]
        if self._tries:
            return self._tries.pop(0)
        self._waited += 1
        return self._best

    def observe(self, count: int, cost: float) -> float:
        """Returns how many times the batch was slower than the best count is."""
        is_first, old = count not in self._cost, self._cost.get(count, cost)
        self._cost[count] = min(_KEEP * old + (1 - _KEEP) * cost, 1.2 * cost)  # good news is believed at once
        before, self._best = self._best, min(self._cost, key=self._cost.__getitem__)
        times = cost / self._cost[self._best]
        if self._best == before:
            self._held += 1
            if count != before and not is_first:
                self._back_off(times)
        else:
            if count == before:
                self._lost(count, times)
            self._held = self._waited = 0
        return times

    def _lost(self, count: int, times: float) -> None:
        """The best count became the slower one."""
        if times >= _COLLAPSE and self._held < _FIRST_RETRY:
            self._back_off(times)
            return
        self._retry_after = _FIRST_RETRY  # it had held for a while: this is news, and may be over soon
        if times < _COLLAPSE:
            self._tries.append(count)  # perhaps it was that one batch; another look is cheap

    def _back_off(self, times: float) -> None:
        self._retry_after = min(round(max(2.0, times) * self._retry_after), _LAST_RETRY)
