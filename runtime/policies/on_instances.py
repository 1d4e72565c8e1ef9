"""Serving with a policy for instances: which tenants with whole weights of their own are in memory, and in what order.

The policies of runtime/policies/instances.py, unchanged, decide; here their jobs become batches. An instance is a place
in memory for one tenant's module: its next job waits until its own batch has ended, the module of another tenant is
loaded in the place of its last one, and the batches of all instances pass the one compute lane.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from runtime.policies.instances import Instance, InstancePolicy, InstanceView, Job
from runtime.policies.token_budget import expired, fitting, wake_s
from runtime.request import Batch, BatchPlan, Slice, TenantKey, Waiting
from runtime.scheduler import View

__all__ = ["OnInstances"]

_BACKBONE = ""  # its digest: always in memory, so it needs no instance
_NOBODY = -1


@dataclass(slots=True, kw_only=True)
class OnInstances:
    """It remembers which tenant each instance holds and what it was given, so it serves one queue. load_s: of a
    tenant's module, for what admission is told."""

    policy: InstancePolicy
    instances: int
    load_s: float = 0.0
    _held: list[str | None] = field(init=False)  # digest of the module that each has, or loads
    _given: list[list[int]] = field(init=False)  # requests of which inputs are left, by instance
    _launched: deque[int] = field(init=False, default_factory=deque)  # instances of what runs, the oldest first
    _numbers: dict[int, int] = field(init=False, default_factory=dict)  # of jobs, by request
    _count: count[int] = field(init=False, default_factory=count)
    _leaving: set[str] = field(init=False, default_factory=set)  # digests that no instance holds any longer

    def __post_init__(self) -> None:
        self._held, self._given = [None] * self.instances, [[] for _ in range(self.instances)]

    def plan(self, view: View) -> BatchPlan:
        expire = tuple(expired(view))
        late = set(expire)
        while len(self._launched) > view.in_flight:
            self._launched.popleft()
        self._given = [[i for i in given if i in view.waiting and i not in late] for given in self._given]
        self._assign(view, late)
        release = tuple(self._leaving)  # said again while they are on their way, for then they cannot leave
        self._leaving = {digest for digest in release if digest in view.loading}
        batches = [*self._of_the_backbone(view, late), *self._of_instances(view)]
        return BatchPlan(
            batches=tuple(batches),
            prefetch=self._missing(view),
            expire=expire,
            wake_s=self._wake_s(view, len(expire)),
            release=release,
        )

    def before(self, view: View, request: Waiting) -> int:
        """Loads count as the tokens that are computed in as much time."""
        kinds = {each.key.digest for each in view.waiting.values()} | {request.key.digest}
        loads = len(kinds - set(self._held) - {_BACKBONE})
        loading = loads * self.load_s * (view.tokens_per_s or 0.0) / self.instances
        return sum(each.tokens for each in view.waiting.values()) + int(loading)

    def _assign(self, view: View, late: set[int]) -> None:
        """Give jobs to idle instances until the policy gives no more."""
        if self.policy.tick_s is None and not any(map(self._is_idle, range(self.instances))):
            return
        for _ in range(self.instances):
            given = self.policy.assign(self._jobs(view, late))
            for jobs, i in given:
                requests = [job.request for job in jobs]
                self._given[i] = [each for each in requests if each in view.waiting and each not in late]
                if self._given[i]:  # else their callers left meanwhile
                    self._leaving |= {self._held[i] or _BACKBONE}
                    self._held[i] = jobs[0].kind
            if not given:
                break
        self._leaving -= {_BACKBONE, *(digest for digest in self._held if digest is not None)}

    def _jobs(self, view: View, late: set[int]) -> InstanceView:
        taken = late.union(*self._given)
        waiting: dict[str, list[Job]] = {}
        numbers = {}
        for i, request in view.waiting.items():
            digest = request.key.digest
            if digest == _BACKBONE:
                continue
            numbers[i] = self._numbers[i] if i in self._numbers else next(self._count)
            if i not in taken:
                job = Job(numbers[i], digest, request.arrival_s, len(request.lengths), request=i)
                waiting.setdefault(digest, []).append(job)
        self._numbers = numbers
        ordered = {digest: waiting[digest] for digest in sorted(waiting)}
        return InstanceView(
            view.now_s, ordered, [Instance(digest, self._is_idle(i)) for i, digest in enumerate(self._held)]
        )

    def _is_idle(self, i: int) -> bool:
        return not self._given[i] and i not in self._launched

    def _of_instances(self, view: View) -> Iterator[Batch]:
        """The next batch of each whose module is there and that runs none."""
        for i, given in enumerate(self._given):
            if given and i not in self._launched and self._held[i] not in view.cold:
                self._launched.append(i)
                yield _batch(view, given)

    def _of_the_backbone(self, view: View, late: set[int]) -> Iterator[Batch]:
        mine = [i for i in view.ready if view.waiting[i].key.digest == _BACKBONE and i not in late]
        if mine and _NOBODY not in self._launched:
            self._launched.append(_NOBODY)
            yield _batch(view, mine)

    def _missing(self, view: View) -> tuple[TenantKey, ...]:
        """Modules of jobs that were given and that are neither in memory nor on their way."""
        firsts = [view.waiting[given[0]].key for given in self._given if given]
        missing = (key for key in firsts if key.digest in view.cold and key.digest not in view.loading)
        return tuple({key.digest: key for key in missing}.values())

    def _wake_s(self, view: View, num_expired: int) -> float | None:
        tick_s = self.policy.tick_s
        waits = len(view.waiting) > sum(map(len, self._given))
        times = [wake_s(view, num_expired, view.now_s), view.now_s + tick_s if tick_s is not None and waits else None]
        return min((each for each in times if each is not None), default=None)


def _batch(view: View, requests: list[int]) -> Batch:
    """As many of their inputs, in that order, as the budget takes."""
    slices: list[Slice] = []
    room = view.max_batch_tokens
    for i in requests:
        request = view.waiting[i]
        inputs, tokens = fitting(request.lengths, 0, None, room, alone=not slices)
        if inputs:
            slices.append(Slice(i, request.first, request.first + inputs))
            room -= tokens
        if inputs < len(request.lengths):
            break
    return Batch(tuple(slices))
