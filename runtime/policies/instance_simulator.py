"""Jobs through instances in virtual time: what a policy for them comes to, before anything is computed. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.policies.instances import Instance, InstancePolicy, InstanceView, Job
from runtime.request_log import Offered
from runtime.simulator import Simulated

__all__ = ["Done", "simulate_instances", "simulate_on_instances"]


@dataclass(frozen=True, slots=True)
class Done:
    """One job: when it left the queue and when it was answered, by which instance, and whether that had to switch for
    it (of jobs that went together, for the first)."""

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
    service_s: Callable[[Sequence[Job]], float],
) -> list[Done]:
    """Every job, in the order of their answers. jobs: numbered in the order of arrival. load_s: of a kind's weights.
    service_s: of jobs that are computed together, which all end together."""
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
        for together, i in given:
            kind = together[0].kind
            switched = kinds[i] != kind
            end_s = now_s + (load_s(kind) if switched else 0.0) + service_s(together)
            kinds[i] = kind
            heapq.heappush(busy, (end_s, i))
            for n, job in enumerate(together):
                waiting[kind].remove(job)
                done.append(Done(job, i, now_s, end_s, switched and not n))
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


def simulate_on_instances(
    requests: Sequence[Offered],
    policy: InstancePolicy,
    instances: int,
    *,
    load_s: float,
    item_s: float,
    advance: Callable[[int], None] = lambda _: None,
) -> Simulated:
    """The tenant of a request is the kind of its job; nobody is refused. Loads are switches. advance: told how many are
    done."""
    jobs = [Job(i, request.tenant, request.at_s, len(request.lengths)) for i, request in enumerate(requests)]
    busy_s = 0.0

    def service_s(together: Sequence[Job]) -> float:
        nonlocal busy_s
        seconds = item_s * sum(job.items for job in together)
        busy_s += seconds
        return seconds

    done = simulate_instances(jobs, policy, instances, load_s=lambda _: load_s, service_s=service_s)
    begin_s, end_s = np.empty(len(jobs)), np.empty(len(jobs))
    for each in done:
        begin_s[each.job.number], end_s[each.job.number] = each.begin_s, each.end_s
    advance(len(done))
    loads = sum(each.switched for each in done)
    return Simulated(
        begin_s=begin_s,
        end_s=end_s,
        outcome=np.zeros(len(jobs), np.int8),
        outcomes=("ok",),
        batches=len({(each.instance, each.begin_s) for each in done}),
        batch_tokens=sum(request.tokens for request in requests),
        busy_s=(busy_s + loads * load_s) / instances,
        loads=loads,
    )
