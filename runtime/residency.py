"""Pure policies: which tenant modules leave memory so that another one fits. Import neither asyncio nor torch.

A policy is told what came, was used and left, and is asked who goes; it reads no clock, so that a recorded trace gives
the same answers in a simulation (runtime/residency_simulator.py) as in the server.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from typing import Protocol

from vbert.errors import ConfigError

__all__ = ["POLICIES", "LfuAgeing", "Lru", "ResidencyPolicy", "make_way", "residency_policy"]

_REMEMBERED = 65_536  # modules that left, whose use counts are kept


class ResidencyPolicy(Protocol):
    """Modules are named by digest. Every one that `arrived` has `left` once, and may come again."""

    def arrived(self, digest: str, num_bytes: int, load_s: float) -> None:
        """A module is in memory now. load_s: what bringing it in again would cost."""
        ...

    def used(self, digest: str) -> None:
        """A batch uses a module that is in memory."""
        ...

    def left(self, digest: str) -> None: ...

    def victims(self, need_bytes: int, keep: Callable[[str], bool]) -> tuple[str, ...] | None:
        """Who to evict for so many bytes, as few as are enough, none of which `keep`. Changes nothing.

        None: not now, because too much must stay; ask again when something was unpinned.
        """
        ...


@dataclass(slots=True)
class Lru:
    """The least recently used goes first. O(victims + kept ones before them)."""

    _sizes: OrderedDict[str, int] = field(default_factory=OrderedDict)  # the longest unused first

    def arrived(self, digest: str, num_bytes: int, load_s: float) -> None:
        self._sizes[digest] = num_bytes

    def used(self, digest: str) -> None:
        self._sizes.move_to_end(digest)

    def left(self, digest: str) -> None:
        del self._sizes[digest]

    def victims(self, need_bytes: int, keep: Callable[[str], bool]) -> tuple[str, ...] | None:
        return _enough(iter(self._sizes.items()), need_bytes, keep)


@dataclass(slots=True)
class _Known:
    """Use count of a module; while in memory also its bytes, what a use is worth, and its place in the queue."""

    uses: float = 0.0
    num_bytes: int = 0
    worth: float = 0.0
    due: float = 0.0
    tick: int = 0


@dataclass(slots=True)
class LfuAgeing:
    """The least worth keeping goes first: rarely used, long ago, large, or cheap to bring back. O(log n) amortised.

    A use lifts a module to `age + uses * load_s / bytes`, and `age` is where the last one left: what was popular once
    sinks. Uses are remembered of modules that left, halved each time, so that a scan of modules asked for once wipes
    nothing. Source: Cherkasova 1998, Greedy-Dual-Size-Frequency (HPL-98-69R1); LFU-DA, Arlitt et al. 2000.
    """

    _resident: dict[str, _Known] = field(default_factory=dict)
    _gone: OrderedDict[str, _Known] = field(default_factory=OrderedDict)
    _queue: list[tuple[float, int, str]] = field(
        default_factory=list
    )  # due, tick; stale where the module has a later tick
    _age: float = 0.0
    _ticks: int = 0

    def arrived(self, digest: str, num_bytes: int, load_s: float) -> None:
        known = self._gone.pop(digest, None) or _Known()
        known.num_bytes, known.worth = num_bytes, load_s / max(1, num_bytes)
        self._resident[digest] = known
        self._lift(digest, known)

    def used(self, digest: str) -> None:
        known = self._resident[digest]
        known.uses += 1
        self._lift(digest, known)

    def left(self, digest: str) -> None:
        known = self._resident.pop(digest)
        while self._queue and not self._is_current(self._queue[0]):
            heapq.heappop(self._queue)
        # a popular one that is removed by hand must not age all the others
        self._age = max(self._age, min([known.due, *(due for due, _, _ in self._queue[:1])]))
        known.uses /= 2
        self._gone[digest] = known
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)

    def victims(self, need_bytes: int, keep: Callable[[str], bool]) -> tuple[str, ...] | None:
        seen: list[tuple[float, int, str]] = []
        chosen = _enough(self._by_due(seen), need_bytes, keep)
        for entry in seen:
            heapq.heappush(self._queue, entry)
        return chosen

    def _by_due(self, seen: list[tuple[float, int, str]]) -> Iterator[tuple[str, int]]:
        """Resident modules, the first to leave first. Takes them off the queue into `seen`."""
        while self._queue:
            entry = heapq.heappop(self._queue)
            if self._is_current(entry):
                seen.append(entry)
                yield entry[2], self._resident[entry[2]].num_bytes

    def _lift(self, digest: str, known: _Known) -> None:
        known.due = self._age + (1 + known.uses) * known.worth
        known.tick = self._ticks = self._ticks + 1
        heapq.heappush(self._queue, (known.due, known.tick, digest))
        if len(self._queue) > 64 + 8 * len(self._resident):
            self._queue = [entry for entry in self._queue if self._is_current(entry)]
            heapq.heapify(self._queue)

    def _is_current(self, entry: tuple[float, int, str]) -> bool:
        known = self._resident.get(entry[2])
        return known is not None and known.tick == entry[1]


def make_way(
    policy: ResidencyPolicy, same: Set[str], crowds: Iterable[frozenset[str]], keep: Callable[[str], bool]
) -> tuple[str, ...] | None:
    """Who to evict so that a slot of one class becomes free, when there are bytes enough but no slot.

    same: any one of these would do.  crowds: so would all of one of these; the first without one to keep is taken.
    """
    one = policy.victims(1, lambda digest: digest not in same or keep(digest)) if same else None
    return one or next((tuple(crowd) for crowd in crowds if not any(map(keep, crowd))), None)


POLICIES: dict[str, Callable[[], ResidencyPolicy]] = {"lru": Lru, "lfu": LfuAgeing}


def residency_policy(name: str) -> ResidencyPolicy:
    """A new policy by its name. Raises ConfigError."""
    if name not in POLICIES:
        raise ConfigError(f"residency policy {name!r} is unknown; use one of {', '.join(POLICIES)}")
    return POLICIES[name]()


def _enough(
    candidates: Iterator[tuple[str, int]], need_bytes: int, keep: Callable[[str], bool]
) -> tuple[str, ...] | None:
    """The first candidates (digest, bytes) that make `need_bytes` together, without those to keep."""
    chosen: list[str] = []
    while need_bytes > 0:
        candidate = next(candidates, None)
        if candidate is None:
            return None
        digest, num_bytes = candidate
        if not keep(digest):
            chosen.append(digest)
            need_bytes -= num_bytes
    return tuple(chosen)
