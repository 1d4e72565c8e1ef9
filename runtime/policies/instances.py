"""Which job goes to which instance next, where an instance holds the whole weights of one kind at a time.

An instance that is given a job of another kind than its last one loads that kind's weights first (a *switch*). A policy
is asked whenever a job arrives or an instance becomes idle, and every `tick_s` if it has one.

Source: FastPTM (Parallel Computing 122, 2024, 103114), online multi-list scheduling, and its baseline, which hands
jobs out in turn as they arrive; the guard and KindBatches are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vbert.errors import ConfigError

__all__ = [
    "INSTANCE_POLICIES",
    "FirstComeFirstServed",
    "Instance",
    "InstancePolicy",
    "InstanceView",
    "Job",
    "KindBatches",
    "MultiList",
    "RoundRobin",
    "instance_policy",
]


@dataclass(frozen=True, slots=True)
class Job:
    """number: in the order of arrival, from 0. items: inputs of it. request: whose job it is, if a queue has such."""

    number: int
    kind: str
    arrived_s: float
    items: int = 1
    request: int = -1


@dataclass(frozen=True, slots=True)
class Instance:
    """kind: of the weights it holds, None before the first."""

    kind: str | None
    idle: bool


@dataclass(frozen=True, slots=True)
class InstanceView:
    """waiting: jobs by kind, in the order of arrival; kinds in an order that never changes."""

    now_s: float
    waiting: Mapping[str, Sequence[Job]]
    instances: Sequence[Instance]

    @property
    def idle(self) -> list[int]:
        return [i for i, instance in enumerate(self.instances) if instance.idle]


class InstancePolicy(Protocol):
    @property
    def tick_s(self) -> float | None: ...

    def assign(self, view: InstanceView) -> list[tuple[tuple[Job, ...], int]]:
        """Waiting jobs, those of one kind together, to an idle instance; no instance twice."""


@dataclass(frozen=True, slots=True)
class FirstComeFirstServed:
    """One queue: whoever is idle takes the job that waits longest."""

    tick_s: float | None = None

    def assign(self, view: InstanceView) -> list[tuple[tuple[Job, ...], int]]:
        jobs = sorted((job for queue in view.waiting.values() for job in queue), key=lambda job: job.number)
        return [((job,), i) for job, i in zip(jobs, view.idle, strict=False)]


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """A queue for each instance, joined in turn, though another instance be idle: what FastPTM calls FCFS."""

    tick_s: float | None = None

    def assign(self, view: InstanceView) -> list[tuple[tuple[Job, ...], int]]:
        count = len(view.instances)
        given: list[tuple[tuple[Job, ...], int]] = []
        for i in view.idle:
            mine = (job for queue in view.waiting.values() for job in queue if job.number % count == i)
            if (job := min(mine, key=lambda job: job.number, default=None)) is not None:
                given.append(((job,), i))
        return given


@dataclass(slots=True)
class MultiList:
    """OMLS. A job for each kind that no instance holds is a candidate; one whose slack is negative is given to the
    first idle instance at once, else each takes the next job of the kind it holds, or the first candidate.

    slack = deadline - waited - items * predicted - load - margin. New candidates are looked for when there are none.

    guard: who cannot meet the deadline any more is not urgent. Without it, under overload, every job becomes urgent in
    its turn, and nearly every one costs a switch.
    """

    deadline_s: float = 3.0
    predicted_s: float = 0.008
    load_s: float = 0.15
    margin_s: float = 0.8
    guard: bool = False
    tick_s: float | None = 0.01
    _candidates: list[Job] = field(default_factory=list)

    def assign(self, view: InstanceView) -> list[tuple[tuple[Job, ...], int]]:
        if not self._candidates:
            held = {instance.kind for instance in view.instances}
            self._candidates = [queue[0] for kind, queue in view.waiting.items() if queue and kind not in held]
        idle = view.idle
        if not idle:
            return []
        urgent = min(self._urgent(view.now_s), key=lambda job: self._slack_s(job, view.now_s), default=None)
        if urgent is not None:
            self._candidates.remove(urgent)
            return [((urgent,), idle[0])]
        return self._in_turn(view, idle)

    def _in_turn(self, view: InstanceView, idle: Sequence[int]) -> list[tuple[tuple[Job, ...], int]]:
        given: list[tuple[tuple[Job, ...], int]] = []
        taken = {job.number for job in self._candidates}
        for i in idle:
            kind = view.instances[i].kind
            own = (job for job in (view.waiting.get(kind, ()) if kind is not None else ()) if job.number not in taken)
            if (job := next(own, None)) is None:
                if not self._candidates:
                    continue
                job = self._candidates.pop(0)
            taken.add(job.number)
            given.append(((job,), i))
        return given

    def _urgent(self, now_s: float) -> list[Job]:
        late = [job for job in self._candidates if self._slack_s(job, now_s) < 0]
        return [job for job in late if self._slack_s(job, now_s) + self.margin_s >= 0] if self.guard else late

    def _slack_s(self, job: Job, now_s: float) -> float:
        waited_s = now_s - job.arrived_s
        return self.deadline_s - waited_s - job.items * self.predicted_s - self.load_s - self.margin_s


@dataclass(frozen=True, slots=True, kw_only=True)
class KindBatches:
    """All waiting jobs of a kind at once, of the kind with the highest ratio of (waited + needs), summed over its jobs,
    to what they take together; a load is part of that unless the instance holds the kind. So a kind that is held goes
    on, others come when enough of theirs waits or waits long enough, and nobody starves. Ours.

    max_items: of a batch. predicted_s: of an item, load_s: of a kind that is not held.
    """

    predicted_s: float = 0.008
    load_s: float = 0.15
    max_items: int = 512
    tick_s: float | None = None

    def assign(self, view: InstanceView) -> list[tuple[tuple[Job, ...], int]]:
        left = {kind: list(queue) for kind, queue in view.waiting.items() if queue}
        given: list[tuple[tuple[Job, ...], int]] = []
        busy_with = {instance.kind for instance in view.instances if not instance.idle}
        # who holds a kind that is waited for chooses first, or another instance would load it once more
        for i in sorted(view.idle, key=lambda i: view.instances[i].kind not in left):
            held = view.instances[i].kind
            others = {each.kind for j, each in enumerate(view.instances) if j != i} & left.keys()
            ratios = {
                kind: self._ratio(queue, view.now_s, held=kind == held)
                for kind, queue in left.items()
                if kind == held or kind not in others or kind in busy_with
            }
            if not ratios:
                continue
            kind = max(ratios, key=ratios.__getitem__)
            jobs = self._first(left[kind])
            left[kind] = left[kind][len(jobs) :]
            if not left[kind]:
                del left[kind]
            given.append((tuple(jobs), i))
        return given

    def _ratio(self, queue: Sequence[Job], now_s: float, *, held: bool) -> float:
        jobs = self._first(queue)
        needs_s = sum(job.items for job in jobs) * self.predicted_s
        waited_s = sum(now_s - job.arrived_s for job in jobs)
        return (waited_s + needs_s) / (needs_s + (0.0 if held else self.load_s))

    def _first(self, queue: Sequence[Job]) -> list[Job]:
        """Of the queue, up to max_items."""
        jobs: list[Job] = []
        items = 0
        for job in queue:
            if jobs and items + job.items > self.max_items:
                break
            jobs.append(job)
            items += job.items
        return jobs


class _Make(Protocol):
    def __call__(self, *, deadline_s: float, item_s: float, load_s: float) -> InstancePolicy: ...


def _lists(guard: bool) -> _Make:
    def make(*, deadline_s: float, item_s: float, load_s: float) -> InstancePolicy:
        return MultiList(deadline_s=deadline_s, predicted_s=item_s, load_s=load_s, guard=guard)

    return make


INSTANCE_POLICIES: dict[str, _Make] = {
    "shared-queue": lambda **_: FirstComeFirstServed(),
    "round-robin": lambda **_: RoundRobin(),
    "omls": _lists(guard=False),
    "omls-guard": _lists(guard=True),
    "kind-batches": lambda *, deadline_s, item_s, load_s: KindBatches(predicted_s=item_s, load_s=load_s),
}


def instance_policy(
    name: str, *, deadline_s: float = 3.0, item_s: float = 0.008, load_s: float = 0.15
) -> InstancePolicy:
    """By name. deadline_s: that jobs are wanted within, item_s: an item takes, load_s: a load. Raises ConfigError."""
    if name not in INSTANCE_POLICIES:
        raise ConfigError(f"the policy for instances is {name!r}; use one of {', '.join(INSTANCE_POLICIES)}")
    return INSTANCE_POLICIES[name](deadline_s=deadline_s, item_s=item_s, load_s=load_s)
