"""Orders in which ready requests take part in batches: what tells most policies apart. Each is a small pure object.

An order gives (request, at most so many of its inputs, or None for all), and may name a request again with a higher
limit. It is read only as far as a batch has room.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Protocol

from runtime.request import Waiting
from runtime.scheduler import View

__all__ = [
    "Arrival",
    "EarliestDeadline",
    "FairShares",
    "Order",
    "ResponseRatio",
    "ShortestFirst",
    "UrgentFirst",
]

_Order = Iterator[tuple[int, int | None]]
_LOOKED_AT = 32  # of those with the earliest deadlines


class Order(Protocol):
    def __call__(self, view: View) -> _Order: ...

    def before(self, view: View, request: Waiting) -> int:
        """As `BatchPolicy.before`."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """First come, first served."""

    def __call__(self, view: View) -> _Order:
        return ((i, None) for i in view.ready)

    def before(self, view: View, request: Waiting) -> int:
        return view.ready_tokens


@dataclass(frozen=True, slots=True)
class ShortestFirst:
    """Shortest job first: the fewest tokens left. Long ones may starve."""

    def __call__(self, view: View) -> _Order:
        waiting = view.waiting
        return ((i, None) for i in sorted(view.ready, key=lambda i: waiting[i].tokens))

    def before(self, view: View, request: Waiting) -> int:
        every = (view.waiting[i].tokens for i in view.ready)
        return sum(tokens for tokens in every if tokens <= request.tokens)


@dataclass(frozen=True, slots=True)
class EarliestDeadline:
    """Earliest deadline first, then those that have none."""

    def __call__(self, view: View) -> _Order:
        waiting = view.waiting
        dated = (i for _, i in view.ready_deadlines)
        return ((i, None) for i in chain(dated, (i for i in view.ready if waiting[i].deadline_s is None)))

    def before(self, view: View, request: Waiting) -> int:
        return _due_before(view, request)


@dataclass(frozen=True, slots=True)
class ResponseRatio:
    """Highest response ratio next: (waited + needs) / needs, which grows fast for short ones and for ever for all."""

    def __call__(self, view: View) -> _Order:
        now_s, waiting = view.now_s, view.waiting

        def ratio(i: int) -> float:
            request = waiting[i]
            return (now_s - request.arrival_s) / (view.batch_s(request.tokens) or request.tokens)

        return ((i, None) for i in sorted(view.ready, key=ratio, reverse=True))  # stable: of equals the first

    def before(self, view: View, request: Waiting) -> int:
        return view.ready_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class UrgentFirst:
    """The oldest, so that nobody starves; who is short of time, the earliest deadline first; then as they came.

    Short of time: less than min_s left, or less than `batches` full batches take.
    """

    min_s: float = 0.1
    batches: float = 3.0

    def __call__(self, view: View) -> _Order:
        yield from _oldest(view)  # or urgent traffic could starve it
        yield from ((i, None) for i in self.urgent(view))
        yield from ((i, None) for i in view.ready)

    def before(self, view: View, request: Waiting) -> int:
        return _due_before(view, request)

    def urgent(self, view: View) -> list[int]:
        rate = view.tokens_per_s or math.inf
        short_s = max(self.min_s, self.batches * view.max_batch_tokens / rate)
        earliest = islice(view.ready_deadlines, _LOOKED_AT)
        return [i for due_s, i in earliest if due_s - view.now_s - view.waiting[i].tokens / rate < short_s]


@dataclass(frozen=True, slots=True, kw_only=True)
class FairShares:
    """By weighted shares of tenants (runtime/shares.py), interactive requests before those of priority `batch`.

    1. one input of the oldest request, so that nobody starves whatever the others do;
    2. requests of priority batch, up to their part of a full batch, so that interactive traffic does not stop them;
    3. who is short of time, as `UrgentFirst` has it, but only of tenants that are not ahead of the others by more than
       `ahead` full batches: deadlines take nobody's share away;
    4. everybody by tag, interactive first.
    """

    batch_part: float = 0.1  # above 0
    ahead: float = 1.0
    urgent: UrgentFirst = UrgentFirst()

    def __call__(self, view: View) -> _Order:
        interactive, batch = view.shares.get("interactive", ()), view.shares.get("batch", ())
        yield from _oldest(view)
        if interactive and batch:
            yield from self._reserved(view)
        if interactive and (urgent := self.urgent.urgent(view)):
            limit = interactive[0][0] + self.ahead * view.max_batch_tokens
            mine = (i for i in urgent if view.waiting[i].priority == "interactive" and view.tag_of(i) <= limit)
            yield from ((i, None) for i in mine)
        yield from ((i, None) for _, i, _ in interactive)
        yield from ((i, None) for _, i, _ in batch)

    def before(self, view: View, request: Waiting) -> int:
        mine, place = view.shares.get(request.priority, ()), (view.tag(request), request.request_id)
        tokens = sum(tokens for _, _, tokens in mine[: bisect_left(mine, place)])
        if request.priority == "batch":
            others = sum(tokens for _, _, tokens in view.shares.get("interactive", ()))
            own = tokens + request.tokens  # which get a part of every batch at least
            tokens = min(tokens + others, int(own / self.batch_part) - request.tokens)
        return tokens

    def _reserved(self, view: View) -> _Order:
        room = self.batch_part * view.max_batch_tokens
        for _, i, _ in view.shares["batch"]:
            if room <= 0:
                return
            lengths = view.waiting[i].lengths
            count = 0
            while count < len(lengths) and room > 0:
                room -= lengths[count]
                count += 1
            yield i, count


def _due_before(view: View, request: Waiting) -> int:
    due_s = math.inf if request.deadline_s is None else request.deadline_s
    earlier = islice(view.ready_deadlines, bisect_left(view.ready_deadlines, (due_s,)))
    return sum(view.waiting[i].tokens for _, i in earlier)


def _oldest(view: View) -> _Order:
    """One input of the oldest that can still be in time."""

    def has_time(i: int) -> bool:
        due_s = view.waiting[i].deadline_s
        return due_s is None or due_s > view.now_s + (view.batch_s(view.waiting[i].lengths[0]) or 0.0)

    return ((i, 1) for i in islice(filter(has_time, view.ready), 1))
