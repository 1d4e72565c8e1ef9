"""The fastest of a few counts, threads or streams, learned from batches that used them. Pure: no threads, no clock."""

from __future__ import annotations

__all__ = ["COLLAPSE", "TICK_S", "CountChoice"]

_KEEP = 0.6  # of the past: one collapsed batch is enough to change
_FIRST_RETRY, _LAST_RETRY = 16, 1024  # batches until the other counts are tried again
TICK_S = 1e-6  # the least a batch takes: a clock may not have moved
COLLAPSE = 4  # times slower than another count: what everybody who waits feels


class CountChoice:
    """For batches of nearly one size. `cost`: recent seconds a token, by count.

    Under a neighbour that comes and goes a try may succeed and the next batch collapse, so both a try that fails and a
    count that soon collapses make the next try rarer: by as many times as the batch was slower, at least twice.
    """

    def __init__(self, counts: tuple[int, ...]) -> None:
        """counts: to choose from, the one to begin with first."""
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
        """cost: above 0. Returns how many times the batch was slower than the best count is."""
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
        if times >= COLLAPSE and self._held < _FIRST_RETRY:
            self._back_off(times)
            return
        self._retry_after = _FIRST_RETRY  # it had held for a while: this is news, and may be over soon
        if times < COLLAPSE:
            self._tries.append(count)  # perhaps it was that one batch; another look is cheap

    def _back_off(self, times: float) -> None:
        self._retry_after = min(round(max(2.0, times) * self._retry_after), _LAST_RETRY)
