"""Jobs to instances: the rules by hand, what FastPTM logged of its switches, and that nobody is lost."""

from __future__ import annotations

import itertools
import random

import pytest

from runtime.policies.instance_simulator import simulate_instances
from runtime.policies.instances import (
    FirstComeFirstServed,
    Instance,
    InstanceView,
    Job,
    KindBatches,
    MultiList,
    RoundRobin,
)

LOAD_S, SERVICE_S = 0.15, 0.1
POLICIES = {
    "fcfs": FirstComeFirstServed,
    "round robin": RoundRobin,
    "omls": MultiList,
    "omls with guard": lambda: MultiList(guard=True),
    "kind batches": KindBatches,
}


def jobs_of(kinds, gap_s=0.0):
    return [Job(i, kind, i * gap_s, 16) for i, kind in enumerate(kinds)]


def run(policy, jobs, instances=1):
    return simulate_instances(
        jobs, policy, instances, load_s=lambda kind: LOAD_S, service_s=lambda jobs: SERVICE_S * len(jobs)
    )


def view(now_s, waiting, *instances):
    kinds = sorted({job.kind for job in waiting})
    return InstanceView(now_s, {k: [job for job in waiting if job.kind == k] for k in kinds}, instances)


# ---- by hand -------------------------------------------------------------------------------------------------------


def test_one_queue_keeps_everybody_busy_and_turns_do_not():
    """The first job takes long; whoever is idle takes the others, or only every second one."""
    jobs = [Job(0, "a", 0.0, 100), *(Job(i, "a", 0.0, 1) for i in range(1, 5))]
    ends = {}
    for policy in (FirstComeFirstServed(), RoundRobin()):
        done = simulate_instances(
            jobs, policy, 2, load_s=lambda kind: 0.0, service_s=lambda jobs: float(sum(job.items for job in jobs))
        )
        ends[type(policy)] = {each.job.number: each.end_s for each in done}
    assert ends[FirstComeFirstServed] == {0: 100, 1: 1, 2: 2, 3: 3, 4: 4}
    assert ends[RoundRobin] == {0: 100, 1: 1, 3: 2, 2: 101, 4: 102}


def test_a_switch_is_a_kind_the_instance_did_not_hold():
    done = run(FirstComeFirstServed(), jobs_of("aabb"))
    assert [each.switched for each in done] == [True, False, True, False]
    assert done[-1].end_s == pytest.approx(2 * LOAD_S + 4 * SERVICE_S)


def test_lists_stay_with_the_kind_that_is_held():
    done = run(MultiList(), jobs_of("abab"))
    assert [each.job.number for each in done] == [0, 2, 1, 3]
    assert sum(each.switched for each in done) == 2


def test_an_urgent_candidate_goes_first():
    """Slack: 3 - waited - 16 * 0.008 - 0.15 - 0.8 = 1.922 - waited."""
    old, own = Job(0, "b", 0.0, 16), Job(1, "a", 1.0, 16)
    held = Instance("a", True)
    assert MultiList().assign(view(1.92, [old, own], held)) == [((own,), 0)]
    assert MultiList().assign(view(1.93, [old, own], held)) == [((old,), 0)]


def test_with_the_guard_who_is_too_late_waits_for_a_turn():
    """Too late: 0.8 s after it became urgent, when it cannot be answered in time any more."""
    old, own = Job(0, "b", 0.0, 16), Job(1, "a", 1.0, 16)
    held = Instance("a", True)
    assert MultiList(guard=True).assign(view(2.7, [old, own], held)) == [((old,), 0)]
    assert MultiList(guard=True).assign(view(2.8, [old, own], held)) == [((own,), 0)]
    assert MultiList().assign(view(2.8, [old, own], held)) == [((old,), 0)]


def test_candidates_are_the_heads_of_lists_that_nobody_holds_in_the_order_of_kinds():
    """The first candidate is of kind b, though c waits longer; and new ones only come when there are none."""
    waiting = [Job(0, "c", 0.0), Job(1, "b", 0.1), Job(2, "a", 0.2)]
    policy = MultiList()
    assert policy.assign(view(0.3, waiting, Instance("a", False))) == []
    waiting = [*waiting[:2], Job(3, "d", 0.3)]
    assert policy.assign(view(0.4, waiting, Instance("a", True))) == [((waiting[1],), 0)]
    assert policy.assign(view(0.5, [waiting[0], waiting[2]], Instance("b", True))) == [((waiting[0],), 0)]


# ---- against what was published ------------------------------------------------------------------------------------


def trace(total, kinds, gap_s, seed):
    """Gaps of Normal(M, M / 3) above 0, kinds at random: what the published traces were measured to be."""
    rng = random.Random(seed)
    jobs, now_s = [], 0.0
    for i in range(total):
        gap = -1.0
        while gap <= 0:
            gap = rng.gauss(gap_s, gap_s / 3)
        now_s += gap
        jobs.append(Job(i, rng.choice("ABCDEFGHIJKL"[:kinds]), now_s, 16))
    return jobs


def test_overload_makes_lists_switch_more_than_their_baseline_and_the_guard_ends_that():
    """Logged for one instance, 240 jobs of 12 kinds, 0.05 s apart: 237 switches of OMLS, 223 of its baseline."""
    jobs = trace(240, 12, 0.05, seed=1)
    switches = {name: sum(each.switched for each in run(make(), jobs)) for name, make in POLICIES.items()}
    repeats = sum(a.kind == b.kind for a, b in itertools.pairwise(jobs))
    assert switches["round robin"] == switches["fcfs"] == 240 - repeats
    assert switches["omls"] > switches["round robin"]
    assert switches["omls with guard"] < 0.3 * switches["omls"]


def test_with_room_to_spare_lists_switch_less_and_nobody_is_late():
    jobs = trace(240, 12, 0.10, seed=2)
    done = {name: run(make(), jobs, instances=3) for name, make in POLICIES.items()}
    switches = {name: sum(each.switched for each in every) for name, every in done.items()}
    assert switches["omls"] == switches["omls with guard"] < 0.9 * switches["round robin"]
    assert not any(each.queued_s > 3 for each in done["omls"])


def test_batches_of_a_kind_wait_for_others_only_while_a_load_costs_more_than_they_wait():
    """Held a, waiting: one of a for 0.1 s; of b one for 0.1 s or for 2 s. Ratios with 0.1 s an item and 0.5 s a load: a
    (0.1 + 0.1) / 0.1 = 2; b (0.1 + 0.1) / 0.6 or (2 + 0.1) / 0.6 = 3.5."""
    policy = KindBatches(predicted_s=0.1, load_s=0.5)
    a, young, old = Job(0, "a", 2.9), Job(1, "b", 2.9), Job(2, "b", 1.0)
    assert policy.assign(view(3.0, [a, young], Instance("a", True))) == [((a,), 0)]
    assert policy.assign(view(3.0, [a, old], Instance("a", True))) == [((old,), 0)]
    both = KindBatches(max_items=2).assign(view(3.0, [a, young, old, Job(3, "b", 3.0)], Instance("b", True)))
    assert both == [((young, old), 0)]


def test_two_instances_do_not_load_the_same_kind():
    waiting = [Job(i, "a", 0.0) for i in range(5)]
    assert KindBatches().assign(view(1.0, waiting, Instance("b", True), Instance("a", True))) == [(tuple(waiting), 1)]


# ---- for all -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("instances", [1, 2, 5])
@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_lost_nobody_served_twice_no_instance_does_two_things(name, instances, seed):
    jobs = trace(60, 4, 0.05 * (seed + 1), seed)
    done = run(POLICIES[name](), jobs, instances)
    assert sorted(each.job.number for each in done) == list(range(60))
    assert all(each.begin_s >= each.job.arrived_s for each in done)
    for i in range(instances):
        mine = sorted((each for each in done if each.instance == i), key=lambda each: (each.begin_s, each.job.number))
        held, free_s = None, 0.0
        for begin_s, together in itertools.groupby(mine, key=lambda each: each.begin_s):
            batch = list(together)
            assert begin_s >= free_s
            assert len({(each.job.kind, each.end_s) for each in batch}) == 1
            held, free_s, switched = batch[0].job.kind, batch[0].end_s, batch[0].job.kind != held
            assert [each.switched for each in batch] == [switched] + [False] * (len(batch) - 1)
            assert free_s - begin_s == pytest.approx(SERVICE_S * len(batch) + LOAD_S * switched)
    assert [each.job.number for each in done] == [each.job.number for each in run(POLICIES[name](), jobs, instances)]


@pytest.mark.parametrize("name", ["fcfs", "round robin"])
def test_the_longest_waiting_goes_first(name):
    done = run(POLICIES[name](), trace(80, 6, 0.02, seed=3), instances=1)
    assert [each.job.number for each in done] == list(range(80))


def test_a_policy_that_serves_nobody_is_found_out():
    class Nobody:
        tick_s = None

        def assign(self, view):
            return []

    with pytest.raises(RuntimeError, match="waiting for ever"):
        run(Nobody(), jobs_of("a"))
