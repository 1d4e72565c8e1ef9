"""What a policy sees and what it decides: which requests form the next batch, which modules to load, who is too late.
No asyncio, no torch. The policies themselves are in runtime/policies/."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.request import BatchPlan, Waiting
from runtime.waiting import WaitingQueue

__all__ = ["BatchPolicy", "View"]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a policy sees, read only; the collections are live indexes of runtime/waiting.py, not copies.

    waiting: requests with inputs still to run, by id. ready: ids whose module is in memory, by arrival; ready_tokens:
    all their tokens. deadlines: (deadline, id) of every unanswered request, ready_deadlines: of the ready ones, both
    earliest first. shares: (tag, id, tokens) of the ready ones by priority, the lowest tag first (runtime/shares.py);
    tag: that a request would get if it came now, tag_of: of one that waits. cold: ids by digest of modules not in
    memory, the longest waiting first; loading: digests on their way. in_flight: batches launched and not finished;
    busy_until_s: when the last of them should end, None if unknown. tokens_per_s: measured, None before the first
    batch; batch_s: seconds of a batch of so many tokens, likewise. ahead_s: what the lanes do for a batch before it
    computes.
    """

    now_s: float
    waiting: Mapping[int, Waiting]
    ready: Sequence[int]
    ready_tokens: int
    deadlines: Sequence[tuple[float, int]]
    ready_deadlines: Sequence[tuple[float, int]]
    shares: Mapping[str, Sequence[tuple[float, int, int]]]
    tag: Callable[[Waiting], float]
    tag_of: Callable[[int], float]
    cold: Mapping[str, Collection[int]]
    loading: Collection[str]
    in_flight: int
    busy_until_s: float | None
    max_batch_tokens: int
    tokens_per_s: float | None
    batch_s: Callable[[int], float | None] = lambda _: None
    ahead_s: float = 0.0

    @classmethod
    def of(
        cls,
        queue: WaitingQueue,
        *,
        now_s: float,
        loading: Collection[str],
        in_flight: int,
        busy_until_s: float | None,
        max_batch_tokens: int,
        tokens_per_s: float | None,
        batch_s: Callable[[int], float | None],
        ahead_s: float = 0.0,
    ) -> View:
        """Of the indexes of a queue, and what else is known."""
        return cls(
            now_s=now_s,
            waiting=queue.waiting,
            ready=queue.ready,
            ready_tokens=queue.ready_tokens,
            deadlines=queue.deadlines,
            ready_deadlines=queue.ready_deadlines,
            shares=queue.shares,
            tag=queue.tag,
            tag_of=queue.tag_of,
            cold=queue.cold,
            loading=loading,
            in_flight=in_flight,
            busy_until_s=busy_until_s,
            max_batch_tokens=max_batch_tokens,
            tokens_per_s=tokens_per_s,
            batch_s=batch_s,
            ahead_s=ahead_s,
        )


class BatchPolicy(Protocol):
    def plan(self, view: View) -> BatchPlan: ...

    def before(self, view: View, request: Waiting) -> int:
        """Tokens that wait and would be computed before `request` if it came now and nobody came after it."""
