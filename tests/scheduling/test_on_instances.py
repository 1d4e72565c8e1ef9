"""Policies for instances, serving: by hand, in virtual time."""

from __future__ import annotations

import pytest

from runtime.policies.named import Instances, batch_policy
from runtime.request import TenantKey, Waiting
from runtime.request_log import Offered
from runtime.scheduler import View
from runtime.simulator import Modules, World, simulate
from runtime.waiting import WaitingQueue

# Every batch takes a second, a load half of one, and there is room for `count` tenants.


def served(name, count, requests):
    modules = Modules(num_bytes=lambda _: 10, load_s=lambda _: 0.5, budget_bytes=10 * count)
    world = World(batch_s=lambda tokens, inputs, tenants: 1.0, max_batch_tokens=100, modules=modules, refuse=False)
    return simulate(requests, batch_policy(name, instances=Instances(count=count, load_s=0.5)), world)


ALTERNATING = [Offered(0.0, "ab"[i % 2], (10,)) for i in range(6)]


@pytest.mark.parametrize(
    ("name", "count", "loads", "end_s"),
    [
        ("shared-queue", 1, 6, [1.5, 3.0, 4.5, 6.0, 7.5, 9.0]),
        ("kind-batches", 1, 2, [1.5, 3.0, 1.5, 3.0, 1.5, 3.0]),  # those of one kind together
        ("kind-batches", 2, 2, [1.5, 2.5, 1.5, 2.5, 1.5, 2.5]),  # the second loads while the first computes
        ("round-robin", 2, 2, [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]),  # a is always for the first, b for the second
    ],
)
def test_alternating_tenants(name, count, loads, end_s):
    done = served(name, count, ALTERNATING)
    assert sorted(done.end_s.tolist()) == pytest.approx(sorted(end_s))
    assert done.loads == loads


def test_two_instances_share_the_module_of_one_tenant():
    """In turn, one serves a and b, the other b and a: the second b is in memory, the second a has left."""
    done = served("round-robin", 2, [Offered(0.0, who, (10,)) for who in "abba"])
    assert done.loads == 3


def test_what_one_batch_does_not_take_comes_in_the_next_without_another_load():
    done = served("kind-batches", 1, [Offered(0.0, "a", (60, 60, 60)), Offered(0.0, "a", (30,))])
    assert (done.loads, done.batches) == (1, 3)
    assert done.end_s.tolist() == pytest.approx([3.5, 3.5])


def test_who_is_given_up_frees_its_instance():
    """The second is late before its turn; the third is served all the same."""
    done = served(
        "shared-queue", 1, [Offered(0.0, "a", (10,)), Offered(0.0, "b", (10,), 1.0), Offered(0.1, "c", (10,))]
    )
    assert [done.outcomes[i] for i in done.outcome] == ["ok", "deadline_exceeded", "ok"]
    assert done.end_s[2] == pytest.approx(3.0)


def view_of(queue, now_s, *, in_flight=0, loading=()):
    return View.of(
        queue,
        now_s=now_s,
        loading=loading,
        in_flight=in_flight,
        busy_until_s=None,
        max_batch_tokens=100,
        tokens_per_s=100.0,
        batch_s=lambda tokens: None,
    )


def waiting(i, digest, deadline_s=None):
    key = TenantKey(tenant=digest, version=1, digest=digest)
    return Waiting(request_id=i, key=key, caller="x", arrival_s=0.0, deadline_s=deadline_s, lengths=(10,))


def test_a_module_that_is_still_on_its_way_is_released_when_it_has_come():
    """Its caller left while it was loading, and the one place in memory is for another tenant."""
    policy, queue = batch_policy("shared-queue", instances=Instances(count=1)), WaitingQueue()
    queue.add(waiting(1, "a"), ready=False)
    assert [key.digest for key in policy.plan(view_of(queue, 0.0)).prefetch] == ["a"]
    queue.forget(1, None)
    queue.add(waiting(2, "b"), ready=False)
    plan = policy.plan(view_of(queue, 0.1, loading={"a"}))
    assert ([key.digest for key in plan.prefetch], plan.release) == (["b"], ("a",))
    assert policy.plan(view_of(queue, 0.2, loading={"a", "b"})).release == ("a",)
    assert policy.plan(view_of(queue, 0.3, loading={"b"})).release == ("a",)  # it has come, and goes
    assert policy.plan(view_of(queue, 0.4, loading={"b"})).release == ()


def test_a_candidate_that_is_late_gets_no_instance():
    policy, queue = batch_policy("omls", instances=Instances(count=1)), WaitingQueue()
    queue.add(waiting(1, "a", 1.0), ready=True)
    queue.add(waiting(2, "c", 1.0), ready=True)
    assert [piece.request_id for batch in policy.plan(view_of(queue, 0.0)).batches for piece in batch.slices] == [1]
    queue.take(1, 1)
    plan = policy.plan(view_of(queue, 2.0))  # both are given up before what is planned is launched
    assert (set(plan.expire), plan.batches) == ({1, 2}, ())


def test_loads_count_for_those_who_want_to_be_in_time():
    policy, queue = batch_policy("shared-queue", instances=Instances(count=2, load_s=0.5)), WaitingQueue()
    queue.add(waiting(1, "a"), ready=False)
    assert policy.before(view_of(queue, 0.0), waiting(2, "b")) == 10 + 2 * 0.5 * 100 / 2
