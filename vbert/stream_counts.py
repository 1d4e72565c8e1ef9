"""On how many streams operators may run. Pure, so that whoever chooses one needs no torch."""

from __future__ import annotations

__all__ = ["MAX_STREAMS", "stream_counts"]

MAX_STREAMS = 32  # torch has so many of one priority


def stream_counts(groups: int) -> tuple[int, ...]:
    """Numbers of streams worth a try for so many groups that share no row: 1, 2, 4 and so on, and one for each."""
    most = min(groups, MAX_STREAMS)
    return (*(1 << i for i in range((most - 1).bit_length())), most)
