"""Requests through a policy in virtual time: what a server would do with them, before anything is computed.

The queue, the policy and the rules of admission are those of the server; what computes is one lane whose batches take
what a cost model says, one after the other, and one loader for modules. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.cost import TYPICAL_LENGTH
from runtime.errors import DeadlineExceeded, RequestTooLarge
from runtime.pace import STEADY, Pace
from runtime.request import Batch, BatchPlan, Slice, TenantKey, Waiting
from runtime.request_log import Offered
from runtime.residency import LfuAgeing, ResidencyPolicy
from runtime.room import Room
from runtime.scheduler import BatchPolicy, View
from runtime.waiting import WaitingQueue
from vbert.errors import ConfigError, Overloaded

__all__ = ["Modules", "Simulated", "World", "simulate"]

_CALLER = "simulated"
_TOLD_EVERY = 4096  # requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Modules:
    """What loads cost. num_bytes: of a tenant's module; load_s: of so many bytes; budget_bytes: how many fit."""

    num_bytes: Callable[[str], int]
    load_s: Callable[[int], float]
    budget_bytes: int
    policy: Callable[[], ResidencyPolicy] = LfuAgeing


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is served on. batch_s: of so many tokens in so many inputs of so many tenants. around_s: what each request
    takes besides, such as to be tokenised and answered. pace: how much longer batches take, and when. modules: None
    where all of them are in memory. kind: of all modules, as a profile names it. weight: of a tenant's share. refuse:
    whether requests are refused that cannot be in time, and where the queue is full."""

    batch_s: Callable[[int, int, int], float]
    around_s: float = 0.0
    pace: Pace = STEADY
    max_batch_tokens: int = 4096
    max_queue_inputs: int = 4096
    modules: Modules | None = None
    kind: str = ""
    weight: Callable[[str], float] = lambda _: 1.0
    refuse: bool = True

    @property
    def full_batch_s(self) -> float:
        """Of short texts, each of another tenant."""
        inputs = max(1, self.max_batch_tokens // TYPICAL_LENGTH)
        return self.batch_s(self.max_batch_tokens, inputs, inputs)

    @property
    def tokens_per_s(self) -> float:
        """Of full batches, at the mean pace."""
        return self.max_batch_tokens / self.pace.mean.seconds(self.full_batch_s, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """One entry a request, seconds of the simulation, NaN where there is none. begin_s: its first input was taken from
    the queue; end_s: it was answered. outcome: `ok` or the code of an error, as an index of `outcomes`."""

    begin_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    outcome: NDArray[np.int8]
    outcomes: tuple[str, ...]
    batches: int
    batch_tokens: int
    busy_s: float
    loads: int

    def is_ok(self) -> NDArray[np.bool_]:
        return np.equal(self.outcome, 0)


def simulate(
    requests: Sequence[Offered], policy: BatchPolicy, world: World, advance: Callable[[int], None] = lambda _: None
) -> Simulated:
    """requests: by arrival. advance: told how many have arrived. Raises ConfigError when the policy serves nobody."""
    return _Simulation(requests, policy, world).run(advance)


@dataclass(slots=True)
class _Running:
    end_s: float
    slices: tuple[Slice, ...]
    tenants: set[str]


class _Simulation:
    def __init__(self, requests: Sequence[Offered], policy: BatchPolicy, world: World) -> None:
        self.requests, self.policy, self.world = requests, policy, world
        self.queue = WaitingQueue()
        self.home = _Home(world.modules, self.queue)
        self.room = Room(
            self.queue,
            max_inputs=world.max_queue_inputs,
            caller_share=2.0,  # the queue is full before one caller's part of it is
            batch_tokens=world.max_batch_tokens,
            rate=self._rate,
        )
        self.full_batch_s = world.full_batch_s
        self.now_s = self.busy_until_s = self.busy_s = 0.0
        self.batches = self.batch_tokens = 0
        self.running: deque[_Running] = deque()
        self.keys: dict[str, TenantKey] = {}
        self.left: dict[int, int] = {}  # inputs without an answer, by request
        self.begin_s, self.end_s = np.full(len(requests), np.nan), np.full(len(requests), np.nan)
        self.outcome = np.zeros(len(requests), np.int8)
        self.outcomes = {"ok": 0}

    def run(self, advance: Callable[[int], None]) -> Simulated:
        count, requests, world = len(self.requests), self.requests, self.world
        arrived = 0
        while True:
            while arrived < count and requests[arrived].at_s + world.around_s <= self.now_s:
                self._admit(arrived + 1, requests[arrived])
                arrived += 1
                if not arrived % _TOLD_EVERY:
                    advance(arrived)
            while self.running and self.running[0].end_s <= self.now_s:
                self._finish(self.running.popleft())
            self.home.finish(self.now_s)
            plan = self.policy.plan(self._view())
            self._apply(plan)
            if plan.batches:
                continue
            times = [] if arrived == count else [requests[arrived].at_s + world.around_s]
            times += [self.running[0].end_s] if self.running else []
            times += self.home.times
            times += [] if plan.wake_s is None else [plan.wake_s]
            if not times:
                break
            self.now_s = min(times)
        if self.queue.waiting:
            raise ConfigError(
                f"{len(self.queue.waiting)} requests wait for ever; give module_budget_bytes that fit them"
            )
        advance(count)
        return Simulated(
            begin_s=self.begin_s,
            end_s=self.end_s,
            outcome=self.outcome,
            outcomes=tuple(self.outcomes),
            batches=self.batches,
            batch_tokens=self.batch_tokens,
            busy_s=self.busy_s,
            loads=self.home.loads,
        )

    def _rate(self) -> float:
        return self.world.max_batch_tokens / self.world.pace.seconds(self.full_batch_s, self.now_s)

    def _view(self) -> View:
        return View.of(
            self.queue,
            now_s=self.now_s,
            loading=self.home.loading,
            in_flight=len(self.running),
            busy_until_s=self.busy_until_s,
            max_batch_tokens=self.world.max_batch_tokens,
            tokens_per_s=self._rate(),
            batch_s=self._batch_s,
        )

    def _batch_s(self, tokens: int) -> float:
        return self.world.pace.seconds(self.world.batch_s(tokens, max(1, tokens // TYPICAL_LENGTH), 1), self.now_s)

    def _admit(self, request_id: int, offered: Offered) -> None:
        key = self.keys.get(offered.tenant)
        if key is None:
            key = self.keys[offered.tenant] = TenantKey(tenant=offered.tenant, version=1, digest=offered.tenant)
        request = Waiting(
            request_id=request_id,
            key=key,
            caller=_CALLER,
            arrival_s=offered.at_s,
            deadline_s=None if offered.deadline_s is None else offered.at_s + offered.deadline_s,
            lengths=offered.lengths,
            weight=self.world.weight(offered.tenant),
            priority=offered.priority,
            kind=self.world.kind,
        )
        if self.world.refuse and (code := self._refusal(request)):
            self._end(request_id, code)
            return
        self.left[request_id] = len(request.lengths)
        self.queue.add(request, ready=self.home.has(key.digest))

    def _refusal(self, request: Waiting) -> str | None:
        try:
            self.room.check(_CALLER, len(request.lengths))
            if request.deadline_s is not None:
                left_s, running_s = request.deadline_s - self.now_s, max(0.0, self.busy_until_s - self.now_s)
                tokens = request.tokens
                before = self.policy.before
                self.room.check_deadline(tokens, left_s, running_s, lambda: before(self._view(), request))
        except (Overloaded, RequestTooLarge) as error:
            return error.code
        return None

    def _apply(self, plan: BatchPlan) -> None:
        for request_id in plan.expire:
            self.queue.forget(request_id, self._deadline_s(request_id))
            del self.left[request_id]
            self._end(request_id, DeadlineExceeded.code)
        for batch in plan.batches:
            self._launch(batch)
        if plan.prefetch or plan.release:
            in_use = {tenant for each in self.running for tenant in each.tenants}
            self.home.release(plan.release, in_use)
            self.home.load(plan.prefetch, self.now_s, in_use)

    def _launch(self, batch: Batch) -> None:
        tokens = inputs = 0
        tenants = set()
        for piece in batch.slices:
            request, count = self.queue.waiting[piece.request_id], piece.last - piece.first
            tokens += request.tokens if count == len(request.lengths) else sum(request.lengths[:count])
            inputs += count
            tenants.add(request.key.digest)
            if not piece.first:
                self.begin_s[piece.request_id - 1] = self.now_s
            self.queue.take(piece.request_id, count)
        self.home.used(tenants)
        begin_s = max(self.now_s, self.busy_until_s)
        seconds = self.world.pace.seconds(self.world.batch_s(tokens, inputs, len(tenants)), begin_s)
        self.busy_until_s = begin_s + seconds
        self.busy_s += seconds
        self.batches += 1
        self.batch_tokens += tokens
        self.running.append(_Running(self.busy_until_s, batch.slices, tenants))

    def _finish(self, batch: _Running) -> None:
        for piece in batch.slices:
            if piece.request_id not in self.left:
                continue  # it expired
            self.left[piece.request_id] -= piece.last - piece.first
            if not self.left[piece.request_id]:
                del self.left[piece.request_id]
                self.queue.forget(piece.request_id, self._deadline_s(piece.request_id))
                self._end(piece.request_id, "ok")

    def _end(self, request_id: int, outcome: str) -> None:
        self.end_s[request_id - 1] = self.now_s
        self.outcome[request_id - 1] = self.outcomes.setdefault(outcome, len(self.outcomes))

    def _deadline_s(self, request_id: int) -> float | None:
        offered = self.requests[request_id - 1]
        return None if offered.deadline_s is None else offered.at_s + offered.deadline_s


class _Home:
    """Which modules are in memory and on their way, one at a time."""

    def __init__(self, modules: Modules | None, queue: WaitingQueue) -> None:
        self._modules, self._queue = modules, queue
        self._policy = modules.policy() if modules else None
        self._free = modules.budget_bytes if modules else 0
        self._here: dict[str, int] = {}
        self._loads: deque[tuple[float, str]] = deque()
        self.loading: dict[str, None] = {}
        self.loads = 0

    @property
    def times(self) -> list[float]:
        """When the next load ends."""
        return [self._loads[0][0]] if self._loads else []

    def has(self, digest: str) -> bool:
        return self._modules is None or digest in self._here

    def used(self, digests: set[str]) -> None:
        if self._policy is not None:
            for digest in digests:
                self._policy.used(digest)

    def load(self, keys: Sequence[TenantKey], now_s: float, in_use: set[str]) -> None:
        """As many as there is room for, with what may leave for them: nothing that runs or that somebody waits for."""
        assert self._modules is not None
        assert self._policy is not None
        for key in keys:
            size = self._modules.num_bytes(key.digest)
            victims = self._policy.victims(size - self._free, lambda d: d in in_use or self._queue.waits_for(d))
            if victims is None:
                return
            for victim in victims:
                self._leave(victim)
            self._free -= size
            self.loading[key.digest] = None
            begin_s = self._loads[-1][0] if self._loads else now_s
            self._loads.append((begin_s + self._modules.load_s(size), key.digest))
            self.loads += 1

    def release(self, digests: Sequence[str], in_use: set[str]) -> None:
        for digest in digests:
            if digest in self._here and digest not in in_use:
                self._leave(digest)

    def _leave(self, digest: str) -> None:
        assert self._policy is not None
        self._policy.left(digest)
        self._free += self._here.pop(digest)
        self._queue.leave(digest)

    def finish(self, now_s: float) -> None:
        assert self._modules is not None or not self._loads
        while self._loads and self._loads[0][0] <= now_s:
            _, digest = self._loads.popleft()
            assert self._modules is not None
            assert self._policy is not None
            del self.loading[digest]
            size = self._here[digest] = self._modules.num_bytes(digest)
            self._policy.arrived(digest, size, self._modules.load_s(size))
            self._queue.arrive(digest)
