"""Pure policies: which requests form the next batch, which modules to load, who is too late. No asyncio, no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from runtime.request import Batch, BatchPlan, Slice, TenantKey, Waiting

__all__ = ["BatchPolicy", "TokenBudget", "View"]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a policy sees, read only; the collections are live indexes of runtime/waiting.py, not copies.

    waiting: requests with inputs still to run, by id. ready: ids whose module is in memory, by arrival; ready_tokens:
    all their tokens. deadlines: (deadline, id) of every unanswered request, ready_deadlines: of the ready ones, both
    earliest first. cold: ids by digest of modules not in memory, the longest waiting first; loading: digests on their
    way. in_flight: batches launched and not finished; busy_until_s: when the last of them should end, None if unknown.
    tokens_per_s: measured, None before the first batch. ahead_s: what the lanes do for a batch before it computes.
    """

    now_s: float
    waiting: Mapping[int, Waiting]
    ready: Sequence[int]
    ready_tokens: int
    deadlines: Sequence[tuple[float, int]]
    ready_deadlines: Sequence[tuple[float, int]]
    cold: Mapping[str, Collection[int]]
    loading: Collection[str]
    in_flight: int
    busy_until_s: float | None
    max_batch_tokens: int
    tokens_per_s: float | None
    ahead_s: float = 0.0


class BatchPolicy(Protocol):
    def plan(self, view: View) -> BatchPlan: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBudget:
    """Arrival order within a token budget, but short of time goes first. O(budget) a plan, whatever waits.

    One batch a plan, filled in this order: one input of the oldest request (so that nobody starves), requests whose
    slack is short (earliest deadline first), then arrival order. A request may be split between its inputs. An input
    longer than the budget runs alone. The slices of one tenant module are neighbours.

    While one batch runs, the next is held back until it is full or the running one is about to end (`lead_s`
    and what the other lanes need for it before), so that it is as large as the traffic allows and the compute lane
    still never waits for it.

    max_in_flight: batches launched at once. max_loading: modules on their way at once. min_slack_s: a request with
    less time than this, or than `slack_batches` full batches take, goes first. max_misses: how many requests in a row
    may not fit before the batch counts as full.
    """

    max_in_flight: int = 2
    max_loading: int = 16
    lead_s: float = 0.002
    min_slack_s: float = 0.1
    slack_batches: float = 3.0
    max_misses: int = 8

    def plan(self, view: View) -> BatchPlan:
        expire = tuple(_expired(view))
        slices: tuple[Slice, ...] = ()
        launch_s = self._launch_s(view)
        if launch_s <= view.now_s:
            slices = self._fill(view)
        return BatchPlan(
            batches=(Batch(slices),) if slices else (),
            prefetch=self._prefetch(view),
            expire=expire,
            wake_s=_wake_s(view, len(expire), launch_s),
        )

    def _launch_s(self, view: View) -> float:
        """When the next batch should be launched; infinite: not before the next event."""
        if not view.ready or view.in_flight >= self.max_in_flight:
            return math.inf
        if view.in_flight == 0 or view.ready_tokens >= view.max_batch_tokens or view.busy_until_s is None:
            return view.now_s
        return max(view.now_s, view.busy_until_s - view.ahead_s - self.lead_s)

    def _fill(self, view: View) -> tuple[Slice, ...]:
        counts: dict[int, int] = {}
        room, misses = view.max_batch_tokens, 0
        for request_id, limit in self._order(view):
            request, taken = view.waiting[request_id], counts.get(request_id, 0)
            if _is_late(view, request_id):
                continue
            count, tokens = _fitting(request.lengths, taken, limit, room, alone=not counts)
            if count > taken:
                counts[request_id] = count
                room, misses = room - tokens, 0
            elif taken < len(request.lengths):
                misses += 1
            if room <= 0 or misses > self.max_misses:
                break
        return _grouped(view.waiting, counts)

    def _order(self, view: View) -> Iterator[tuple[int, int | None]]:
        """(request, at most so many of its inputs or None for all); a request may come again with a higher limit."""
        alive = (request_id for request_id in view.ready if not _is_late(view, request_id))
        yield from ((request_id, 1) for request_id in islice(alive, 1))  # or urgent traffic could starve the oldest
        yield from ((request_id, None) for request_id in self._urgent(view))
        yield from ((request_id, None) for request_id in view.ready)

    def _urgent(self, view: View) -> list[int]:
        rate = view.tokens_per_s or math.inf
        short_s = max(self.min_slack_s, self.slack_batches * view.max_batch_tokens / rate)
        earliest = islice(view.ready_deadlines, 32)
        return [i for due_s, i in earliest if due_s - view.now_s - view.waiting[i].tokens / rate < short_s]

    def _prefetch(self, view: View) -> tuple[TenantKey, ...]:
        room = self.max_loading - len(view.loading)
        if room <= 0:
            return ()
        wanted = (ids for digest, ids in view.cold.items() if digest not in view.loading)
        return tuple(view.waiting[next(iter(ids))].key for ids in islice(wanted, room))


def _is_late(view: View, request_id: int) -> bool:
    deadline_s = view.waiting[request_id].deadline_s
    return deadline_s is not None and deadline_s <= view.now_s


def _expired(view: View) -> Iterator[int]:
    for deadline_s, request_id in view.deadlines:
        if deadline_s > view.now_s:
            return
        yield request_id


def _fitting(lengths: Sequence[int], taken: int, limit: int | None, room: int, *, alone: bool) -> tuple[int, int]:
    """(inputs in the batch, tokens added) when up to `limit` inputs go in after the first `taken` ones."""
    count, tokens = taken, 0
    for length in islice(lengths, taken, limit):
        if tokens + length > room and not (alone and count == 0):
            break
        count, tokens = count + 1, tokens + length
    return count, tokens


def _grouped(waiting: Mapping[int, Waiting], counts: Mapping[int, int]) -> tuple[Slice, ...]:
    """Slices with those of one module side by side, modules in order of their first slice."""
    groups: dict[str, list[Slice]] = {}
    for request_id, count in counts.items():
        request = waiting[request_id]
        groups.setdefault(request.key.digest, []).append(Slice(request_id, request.first, request.first + count))
    return tuple(piece for group in groups.values() for piece in group)


def _wake_s(view: View, num_expired: int, launch_s: float) -> float | None:
    """The next deadline or the launch of a held-back batch, whichever comes first; always later than now."""
    times = [deadline_s for deadline_s, _ in view.deadlines[num_expired : num_expired + 1]]
    if view.now_s < launch_s < math.inf:
        times.append(launch_s)
    return min(times, default=None)
