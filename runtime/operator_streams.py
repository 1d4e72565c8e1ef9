"""On how many streams the operators of a batch run, learned from the batches before it. Pure: no threads, no clock.

Small operators leave most of a GPU idle, and several side by side fill it; large ones fill it alone, and events between
streams cost time. So each number is tried, one stream first, and the fastest kept: only tries are slower than that.
"""

from __future__ import annotations

from runtime.count_choice import TICK_S, CountChoice
from vbert.stream_counts import stream_counts

__all__ = ["StreamChoice"]


class StreamChoice:
    """The fastest number, for each size of batch (by powers of two) and number of groups on its own."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[int, int], CountChoice] = {}

    def choose(self, tokens: int, groups: int) -> int:
        return self._size(tokens, groups).choose()

    def observe(self, count: int, tokens: int, groups: int, seconds: float) -> None:
        self._size(tokens, groups).observe(count, max(seconds, TICK_S) / tokens)

    def _size(self, tokens: int, groups: int) -> CountChoice:
        return self._sizes.setdefault((tokens.bit_length(), groups), CountChoice(stream_counts(groups)))
