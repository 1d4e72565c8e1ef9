"""Stand-ins for time and for what a policy looks at. Everything else in the tests is the real thing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from runtime.policies.named import DEFAULT, batch_policy
from runtime.request import BatchPlan, TenantKey, Waiting
from runtime.scheduler import BatchPolicy, View
from runtime.waiting import WaitingQueue


class ManualClock:
    """A clock that moves when it is told to."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now = now_s

    def now_s(self) -> float:
        return self.now


class Line:
    """A waiting line for policies: put requests in, plan, apply the plan, as the engine does, in virtual time."""

    def __init__(self, *, max_batch_tokens: int = 100, tokens_per_s: float | None = None) -> None:
        self.queue = WaitingQueue()
        self.resident: set[str] = set()
        self.loading: dict[str, None] = {}
        self.max_batch_tokens, self.tokens_per_s = max_batch_tokens, tokens_per_s
        self.now_s, self.in_flight, self.busy_until_s, self.ahead_s = 0.0, 0, None, 0.0
        self._next = 1

    def put(
        self,
        *lengths: int,
        tenant: str = "a",
        deadline_s: float | None = None,
        cold: bool = False,
        caller: str = "x",
        weight: float = 1.0,
        priority: str = "interactive",
    ) -> int:
        if not cold:
            self.resident.add(tenant)
        request = Waiting(
            request_id=self._next,
            key=TenantKey(tenant=tenant, version=1, digest=tenant),
            caller=caller,
            arrival_s=self.now_s,
            deadline_s=deadline_s,
            lengths=lengths,
            weight=weight,
            priority=priority,
        )
        self.queue.add(request, ready=tenant in self.resident)
        self._next += 1
        return request.request_id

    def view(self) -> View:
        return View.of(
            self.queue,
            now_s=self.now_s,
            loading=self.loading.keys(),
            in_flight=self.in_flight,
            busy_until_s=self.busy_until_s,
            max_batch_tokens=self.max_batch_tokens,
            tokens_per_s=self.tokens_per_s,
            batch_s=lambda tokens: tokens / self.tokens_per_s if self.tokens_per_s else None,
            ahead_s=self.ahead_s,
        )

    def apply(self, plan: BatchPlan) -> list[int]:
        """Take what the plan takes; returns the requests in its batches, one entry an input."""
        for request_id in plan.expire:
            deadline_s = dict((i, d) for d, i in self.queue.deadlines)[request_id]
            self.queue.forget(request_id, deadline_s)
        for key in plan.prefetch:
            self.loading[key.digest] = None
        ran = []
        for piece in slices(plan):
            request = self.queue.waiting[piece.request_id]
            assert piece.first == request.first
            assert piece.last <= request.first + len(request.lengths)
            ran += [piece.request_id] * (piece.last - piece.first)
            self.queue.take(piece.request_id, piece.last - piece.first)
            if piece.request_id not in self.queue.waiting:
                self.queue.forget(piece.request_id, request.deadline_s)
        return ran

    def arrive(self, digests: Iterable[str]) -> None:
        for digest in tuple(digests):
            self.loading.pop(digest, None)
            self.resident.add(digest)
            self.queue.arrive(digest)


def slices(plan: BatchPlan):
    return [piece for batch in plan.batches for piece in batch.slices]


class GatedPolicy:
    """A policy that launches nothing while it is shut, so that a test decides when waiting ends. It starts open, for
    the engine's first canary."""

    def __init__(self, inner: BatchPolicy | None = None) -> None:
        self.inner = inner or batch_policy(DEFAULT)
        self.open = True

    def before(self, view: View, request: Waiting) -> int:
        return self.inner.before(view, request)

    def plan(self, view: View) -> BatchPlan:
        plan = self.inner.plan(view)
        return plan if self.open else replace(plan, batches=(), wake_s=view.now_s + 0.001)
