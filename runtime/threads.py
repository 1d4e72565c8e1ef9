"""How many cores the next batch should use, learned from the batches before it. Pure: no threads, no clock.

On two cores a batch on two threads is nearly twice as fast as on one, until a neighbour (event loop, tokenizer, another
process) keeps one of them busy: then every operator waits for its slower half, and it is several times slower, while
one thread does not notice. Nobody tells us which case it is, so each count is tried, and tried again now and then.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.count_choice import COLLAPSE, TICK_S, CountChoice

__all__ = ["ThreadChoice"]


class ThreadChoice:
    """The fastest of a few thread counts, for each size of batch (by powers of two) on its own."""

    def __init__(self, counts: tuple[int, ...], on_collapse: Callable[[int, float], None] | None = None) -> None:
        """counts: to choose from, the one to begin with first. on_collapse: told once, when a batch on several threads
        was many times slower than on another count: their number, and how many times."""
        self.counts = counts
        self._on_collapse = on_collapse
        self._sizes: dict[int, CountChoice] = {}

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
        times = self._size(tokens).observe(count, max(seconds, TICK_S) / max(1, tokens))
        if self._on_collapse and count > 1 and times >= COLLAPSE:
            on_collapse, self._on_collapse = self._on_collapse, None
            on_collapse(count, times)

    def _size(self, tokens: int) -> CountChoice:
        return self._sizes.setdefault(tokens.bit_length(), CountChoice(self.counts))
