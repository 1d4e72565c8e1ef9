"""Replays requests through a residency policy in no time: which share would have found its module in memory?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass

from runtime.residency import ResidencyPolicy

__all__ = ["Replayed", "replay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What happened. load_s: seconds of all loads together."""

    requests: int
    hits: int
    loaded_bytes: int
    load_s: float
    evictions: int

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests if self.requests else 0.0


def replay(
    policy: ResidencyPolicy,
    requests: Iterable[str],
    *,
    num_bytes: Callable[[str], int],
    load_s: Callable[[int], float],
    budget_bytes: int,
    pinned: Set[str] = frozenset(),
    prefetched: Iterable[str] = (),
) -> Replayed:
    """One request after the other, each served from memory or after a load. What finds no room stays out.

    num_bytes: of a digest.  load_s: seconds to bring in so many bytes.  pinned: stay once they are in memory.
    prefetched: brought in before the first request, as far as there is room; their loads are not counted.
    """
    resident: dict[str, int] = {}
    free = budget_bytes
    count = hits = loaded = evictions = 0
    seconds = 0.0
    for digest in prefetched:
        if (size := num_bytes(digest)) <= free and digest not in resident:
            resident[digest] = size
            free -= size
            policy.arrived(digest, size, load_s(size))
    for digest in requests:
        count += 1
        if digest in resident:
            hits += 1
        else:
            size = num_bytes(digest)
            loaded, seconds = loaded + size, seconds + load_s(size)
            victims = policy.victims(size - free, pinned.__contains__)
            if victims is None:
                continue
            for victim in victims:
                policy.left(victim)
                free += resident.pop(victim)
                evictions += 1
            resident[digest] = size
            free -= size
            policy.arrived(digest, size, load_s(size))
        policy.used(digest)
    return Replayed(requests=count, hits=hits, loaded_bytes=loaded, load_s=seconds, evictions=evictions)
