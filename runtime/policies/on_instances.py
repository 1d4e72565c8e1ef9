"""Serving with a policy for instances: which tenants with whole weights of their own are in memory, and in what order.

The policies of runtime/policies/instances.py, unchanged, decide; here their jobs become batches. An instance is a place
in memory for one tenant's module: its next job waits until its own batch has ended, the module of another tenant is
loaded in the place of its last one, and the batches of all instances pass the one compute lane.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from runtime.policies.instances import Instance, InstancePolicy, InstanceView, Job
from runtime.policies.token_budget import expired, fitting, wake_s
from runtime.request import Batch, BatchPlan, Slice, TenantKey, Waiting
from runtime.scheduler import View

__all__ = ["OnInstances"]

_BACKBONE = ""  # its digest: always in memory, so it needs no instance
_NOBODY = -1


@dataclass(slots=True, kw_only=True)
class OnInstances:
    """It remembers which tenant each instance holds and what it was given, so it serves one queue."""

    policy: InstancePolicy
    instances: int
    _held: list[str | None] = field(init=False)  # digest of the module that each has, or loads
    _given: list[list[int]] = field(init=False)  # requests of which inputs are left, by instance
    _launched: deque[int] = field(init=False, default_factory=deque)  # instances of what runs, the oldest first

    def __post_init__(self) -> None:
        self._held, self._given = [None] * self.instances, [[] for _ in range(self.instances)]

    def plan(self, view: View) -> BatchPlan:
        expire = tuple(expired(view))
        while len(self._launched) > view.in_flight:
            self._launched.popleft()
        left = [[i for i in given if i in view.waiting and i not in expire] for given in self._given]
        self._given = left
        release = self._assign(view, set(expire))
        batches = [*self._of_the_backbone(view, set(expire)), *self._of_instances(view)]
        return BatchPlan(
            batches=tuple(batches),
            prefetch=self._missing(view),
            expire=expire,
            wake_s=self._wake_s(view, len(expire)),
            release=tuple(release),
        )

    def before(self, view: View, request: Waiting) -> int:
        return sum(each.tokens for each in view.waiting.values())

    def _assign(self, view: View, late: set[int]) -> list[str]:
        """Give jobs to idle instances until the policy gives no more. Modules that nobody holds any longer."""
        held = set(self._held)
        for _ in range(self.instances):
            given = self.policy.assign(self._jobs(view, late))
            for jobs, i in given:
                kind = jobs[0].kind
                self._given[i] = [job.number for job in jobs if job.number in view.waiting]
                self._held[i] = kind if self._given[i] else self._held[i]  # else their callers left meanwhile
            if not given:
                break
        return [digest for digest in held - set(self._held) if digest is not None]

    def _jobs(self, view: View, late: set[int]) -> InstanceView:
        taken = late.union(*self._given)
        waiting: dict[str, list[Job]] = {}
        for i, request in view.waiting.items():
            digest = request.key.digest
            if i not in taken and digest != _BACKBONE:
                waiting.setdefault(digest, []).append(Job(i, digest, request.arrival_s, len(request.lengths)))
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
        count, tokens = fitting(request.lengths, 0, None, room, alone=not slices)
        if count:
            slices.append(Slice(i, request.first, request.first + count))
            room -= tokens
        if count < len(request.lengths):
            break
    return Batch(tuple(slices))
