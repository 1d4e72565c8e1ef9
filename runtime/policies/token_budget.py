"""Batches within a token budget, in any order of requests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from runtime.policies.orders import Order
from runtime.request import Batch, BatchPlan, Slice, TenantKey, Waiting
from runtime.scheduler import View

__all__ = ["DEADLINE_PART", "TokenBudget", "expired", "fitting", "prefetched", "wake_s"]

DEADLINE_PART = 0.25  # of the time from arrival to deadline, that the batch of a request may take
_LOOKED_AT = 32  # of those with the earliest deadlines


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBudget:
    """One batch a plan, filled in the order given. O(budget) a plan, whatever waits, if the order is.

    A request may be split between its inputs. An input longer than the budget runs alone. The slices of one tenant
    module are neighbours.

    While one batch runs, the next is held back until it is full or the running one is about to end (`lead_s`
    and what the other lanes need for it before), so that it is as large as the traffic allows and the compute lane
    still never waits for it.

    packing: else a batch is of one request, as in textbooks. window_s: a batch that is not full waits so long for
    others, from the arrival of the oldest, even if nothing runs. hopeless: whether requests are computed whose deadline
    will pass before the batch ends, while there are others. max_in_flight: batches launched at once. max_loading:
    modules on their way at once. max_misses: how many requests in a row may not fit before the batch counts as full.
    """

    order: Order
    packing: bool = True
    window_s: float = 0.0
    in_time: bool = False
    max_in_flight: int = 2
    max_loading: int = 16
    lead_s: float = 0.002
    max_misses: int = 8

    def plan(self, view: View) -> BatchPlan:
        expire = tuple(expired(view))
        slices: tuple[Slice, ...] = ()
        launch_s = self._launch_s(view)
        if launch_s <= view.now_s:
            budget = min(view.max_batch_tokens, _in_time(view)) if self.in_time else view.max_batch_tokens
            ends_s = _ends_s(view, budget) if self.in_time else view.now_s
            slices = self._fill(view, budget, ends_s) or self._fill(view, budget, view.now_s)
        return BatchPlan(
            batches=(Batch(slices),) if slices else (),
            prefetch=prefetched(view, self.max_loading),
            expire=expire,
            wake_s=wake_s(view, len(expire), launch_s),
        )

    def before(self, view: View, request: Waiting) -> int:
        return self.order.before(view, request)

    def _launch_s(self, view: View) -> float:
        """When the next batch should be launched; infinite: not before the next event."""
        if not view.ready or view.in_flight >= self.max_in_flight:
            return math.inf
        if view.ready_tokens >= view.max_batch_tokens:
            return view.now_s
        if view.in_flight == 0:
            return max(view.now_s, view.waiting[view.ready[0]].arrival_s + self.window_s)
        if view.busy_until_s is None:
            return view.now_s
        return max(view.now_s, view.busy_until_s - view.ahead_s - self.lead_s)

    def _fill(self, view: View, budget: int, ends_s: float) -> tuple[Slice, ...]:
        """Of requests that are not due before ends_s."""
        counts: dict[int, int] = {}
        room, misses = budget, 0
        for request_id, limit in self.order(view):
            request, taken = view.waiting[request_id], counts.get(request_id, 0)
            if request.deadline_s is not None and request.deadline_s <= ends_s:
                continue
            if not self.packing and counts and request_id not in counts:
                break
            count, tokens = fitting(request.lengths, taken, limit, room, alone=not counts)
            if count > taken:
                counts[request_id] = count
                room, misses = room - tokens, 0
            elif taken < len(request.lengths):
                misses += 1
            if room <= 0 or misses > self.max_misses:
                break
        return _grouped(view.waiting, counts)


def _in_time(view: View) -> int:
    """Tokens of a batch that takes no larger part of the time that a waiting request was given, of those with the
    earliest deadlines. Who is too late anyway, or whose tenant is ahead of the others, makes nobody's batch short; and
    none is so short that most of it is what any batch takes."""
    rate, least_s = view.tokens_per_s, view.batch_s(1)
    if rate is None or least_s is None or not view.ready_deadlines:
        return view.max_batch_tokens
    begin_s = max(view.now_s, view.busy_until_s or 0.0)
    tags = view.shares.get("interactive", ())
    limit = tags[0][0] + view.max_batch_tokens if tags else math.inf
    given_s = math.inf
    for due_s, i in islice(view.ready_deadlines, _LOOKED_AT):
        if due_s > begin_s + least_s and view.tag_of(i) <= limit:
            given_s = min(given_s, due_s - view.waiting[i].arrival_s)
    if given_s == math.inf:
        return view.max_batch_tokens
    return max(int(DEADLINE_PART * given_s * rate), view.max_batch_tokens // 8, int(least_s * rate))


def _ends_s(view: View, budget: int) -> float:
    """When a batch of as much as is ready would end, or now if nobody knows."""
    seconds = view.batch_s(min(view.ready_tokens, budget))
    return view.now_s if seconds is None else max(view.now_s, view.busy_until_s or 0.0) + seconds


def prefetched(view: View, max_loading: int) -> tuple[TenantKey, ...]:
    """Modules to bring in next: those waited for longest."""
    room = max_loading - len(view.loading)
    if room <= 0 or not view.cold:
        return ()
    wanted = (ids for digest, ids in view.cold.items() if digest not in view.loading)
    return tuple(view.waiting[next(iter(ids))].key for ids in islice(wanted, room))


def expired(view: View) -> Iterator[int]:
    """Requests whose deadline passed."""
    for deadline_s, request_id in view.deadlines:
        if deadline_s > view.now_s:
            return
        yield request_id


def wake_s(view: View, num_expired: int, launch_s: float) -> float | None:
    """The next deadline or the launch of a held-back batch, whichever comes first; always later than now."""
    times = [deadline_s for deadline_s, _ in view.deadlines[num_expired : num_expired + 1]]
    if view.now_s < launch_s < math.inf:
        times.append(launch_s)
    return min(times, default=None)


def fitting(lengths: Sequence[int], taken: int, limit: int | None, room: int, *, alone: bool) -> tuple[int, int]:
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
