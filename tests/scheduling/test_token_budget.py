"""Batches within a token budget: hand-worked plans. Laws for all policies: test_policies.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtime.policies.orders import UrgentFirst
from runtime.policies.token_budget import TokenBudget
from runtime.request import Slice
from tests.fakes import Line, slices

POLICY = TokenBudget(order=UrgentFirst(), max_loading=4)


def planned(line: Line):
    return slices(POLICY.plan(line.view()))


def test_nothing_waits():
    plan = POLICY.plan(Line().view())
    assert (plan.batches, plan.prefetch, plan.expire, plan.wake_s) == ((), (), (), None)


def test_arrival_order_within_the_budget():
    line = Line()
    first, second, third = line.put(60), line.put(30), line.put(20)
    assert planned(line) == [Slice(first, 0, 1), Slice(second, 0, 1)]
    line.apply(POLICY.plan(line.view()))
    assert planned(line) == [Slice(third, 0, 1)]


def test_a_request_is_split_between_its_inputs_and_goes_on_where_it_stopped():
    line = Line()
    request = line.put(40, 40, 40)
    assert planned(line) == [Slice(request, 0, 2)]
    line.apply(POLICY.plan(line.view()))
    assert planned(line) == [Slice(request, 2, 3)]


def test_an_input_that_does_not_fit_leaves_room_for_later_ones():
    line = Line()
    first, big, small = line.put(60), line.put(70), line.put(40)
    assert planned(line) == [Slice(first, 0, 1), Slice(small, 0, 1)]
    line.apply(POLICY.plan(line.view()))
    assert planned(line) == [Slice(big, 0, 1)]


def test_an_input_larger_than_the_budget_runs_alone():
    line = Line()
    huge, small = line.put(500, 10), line.put(10)
    assert planned(line) == [Slice(huge, 0, 1)]
    line.apply(POLICY.plan(line.view()))
    assert planned(line) == [Slice(huge, 1, 2), Slice(small, 0, 1)]


def test_slices_of_one_tenant_are_neighbours():
    line = Line()
    a, b, again = line.put(10, tenant="a"), line.put(10, tenant="b"), line.put(10, tenant="a")
    assert planned(line) == [Slice(a, 0, 1), Slice(again, 0, 1), Slice(b, 0, 1)]


def test_short_of_time_goes_first_but_never_before_the_oldest():
    line = Line(max_batch_tokens=30, tokens_per_s=100.0)
    oldest = line.put(10, 10, 10, deadline_s=60.0)
    line.put(10, deadline_s=50.0)
    urgent = line.put(10, deadline_s=0.6)
    more_urgent = line.put(10, deadline_s=0.4)
    assert {piece.request_id for piece in planned(line)} == {oldest, urgent, more_urgent}
    assert planned(line)[0] == Slice(oldest, 0, 1)


def test_what_takes_long_is_urgent_earlier():
    """200 tokens at 100 a second need 2 s: with a deadline in 2.5 s they cannot wait, 10 tokens can."""
    line = Line(max_batch_tokens=30, tokens_per_s=100.0)
    line.put(30, deadline_s=60.0)
    line.put(10, deadline_s=2.4)
    long = line.put(*[20] * 10, deadline_s=2.5)
    line.apply(POLICY.plan(line.view()))
    assert planned(line)[-1].request_id == long


def test_expired_requests_are_named_and_not_run():
    line = Line()
    late, fine = line.put(10, deadline_s=1.0), line.put(10, deadline_s=3.0)
    line.now_s = 1.0
    plan = POLICY.plan(line.view())
    assert plan.expire == (late,)
    assert slices(plan) == [Slice(fine, 0, 1)]
    assert plan.wake_s == 3.0


def test_cold_tenants_are_prefetched_in_order_and_block_nobody():
    line = Line()
    for i in range(10):
        line.put(10, tenant=f"cold{i}", cold=True)
    warm = line.put(10)
    plan = POLICY.plan(line.view())
    assert slices(plan) == [Slice(warm, 0, 1)]
    assert [key.tenant for key in plan.prefetch] == ["cold0", "cold1", "cold2", "cold3"]
    line.apply(plan)
    assert POLICY.plan(line.view()).prefetch == ()
    line.arrive(["cold1"])
    plan = POLICY.plan(line.view())
    assert [key.tenant for key in plan.prefetch] == ["cold4"]
    assert [line.queue.waiting[piece.request_id].key.tenant for piece in slices(plan)] == ["cold1"]


def test_the_next_batch_waits_until_the_running_one_is_about_to_end():
    line = Line(tokens_per_s=1000.0)
    line.put(10)
    line.in_flight, line.busy_until_s = 1, 0.5
    plan = POLICY.plan(line.view())
    assert plan.batches == ()
    assert plan.wake_s == pytest.approx(0.5 - POLICY.lead_s)
    line.ahead_s = 0.1  # packing and gathering it takes that long
    plan = POLICY.plan(line.view())
    assert plan.wake_s == pytest.approx(0.4 - POLICY.lead_s)
    line.now_s = plan.wake_s
    assert len(planned(line)) == 1


def test_a_full_batch_does_not_wait_and_two_in_flight_are_enough():
    line = Line(tokens_per_s=1000.0)
    line.put(*[10] * 30)
    line.in_flight, line.busy_until_s = 1, 0.5
    assert len(planned(line)) == 1
    line.in_flight = 2
    assert planned(line) == []


def test_nobody_starves_behind_urgent_traffic():
    """Each round brings more urgent work than fits; the old request without a deadline still gets on."""
    line = Line(max_batch_tokens=50, tokens_per_s=100.0)
    old = line.put(*[20] * 5)
    for _ in range(5):
        line.put(20, 20, 20, deadline_s=line.now_s + 0.5)
        assert old in line.apply(POLICY.plan(line.view()))
        line.now_s += 0.1
    assert old not in line.queue.waiting


class Counted(dict):
    looked_at = 0

    def __getitem__(self, key):
        self.looked_at += 1
        return super().__getitem__(key)


def test_planning_looks_at_no_more_than_one_batch_of_4096_waiting():
    line = Line(max_batch_tokens=4096, tokens_per_s=50_000.0)
    for i in range(4096):
        line.put(32, tenant=f"t{i % 64}", deadline_s=30.0 + i, cold=i % 2 == 1)
    waiting = Counted(line.queue.waiting)
    plan = POLICY.plan(replace(line.view(), waiting=waiting))
    assert len(slices(plan)) == 128
    assert waiting.looked_at < 4 * 128
