"""Jobs through instances in virtual time: what a policy for them comes to, before anything is computed."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.policies.instances import Instance, InstancePolicy, InstanceView, Job

__all__ = ["Done", "simulate_instances"]


@dataclass(frozen=True, slots=True)
class Done:
    """One job: when it left the queue and when it was answered, by which instance, and whether that had to switch."""

    job: Job
    instance: int
    begin_s: float
    end_s: float
    switched: bool

    @property
    def queued_s(self) -> float:
        return self.begin_s - self.job.arrived_s


def simulate_instances(
    jobs: Sequence[Job],
    policy: InstancePolicy,
    instances: int,
    *,
    load_s: Callable[[str], float],
    service_s: Callable[[Job], float],
) -> list[Done]:
    """Every job, in the order of their answers. jobs: numbered in the order of arrival. load_s: of a kind's weights."""
    waiting: dict[str, list[Job]] = {kind: [] for kind in sorted({job.kind for job in jobs})}
    kinds: list[str | None] = [None] * instances
    busy: list[tuple[float, int]] = []  # until when, which
    done: list[Done] = []
    left, now_s = iter(jobs), 0.0
    coming = next(left, None)
    while coming is not None or busy or any(waiting.values()):
        occupied = {i for _, i in busy}
        view = InstanceView(now_s, waiting, [Instance(kind, i not in occupied) for i, kind in enumerate(kinds)])
        given = policy.assign(view)
        for job, i in given:
            waiting[job.kind].remove(job)
            switched = kinds[i] != job.kind
            end_s = now_s + (load_s(job.kind) if switched else 0.0) + service_s(job)
            kinds[i] = job.kind
            heapq.heappush(busy, (end_s, i))
            done.append(Done(job, i, now_s, end_s, switched))
        if given:
            continue  # the others may still be idle
        events = [busy[0][0]] if busy else []
        events += [coming.arrived_s] if coming is not None else []
        events += [now_s + policy.tick_s] if policy.tick_s is not None and any(waiting.values()) else []
        if not events:
            raise RuntimeError(f"the policy {type(policy).__name__} leaves jobs waiting for ever")
        now_s = min(events)
        while busy and busy[0][0] <= now_s:
            heapq.heappop(busy)
        while coming is not None and coming.arrived_s <= now_s:
            waiting[coming.kind].append(coming)
            coming = next(left, None)
    return sorted(done, key=lambda each: each.end_s)
