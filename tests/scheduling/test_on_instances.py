"""Policies for instances, serving: by hand, in virtual time."""

from __future__ import annotations

import pytest

from runtime.policies.named import Instances, batch_policy
from runtime.request_log import Offered
from runtime.simulator import Modules, World, simulate

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
    """In turn, one serves a, c, b and the other b, a, c: twice the next module is in memory, held by the other one."""
    done = served("round-robin", 2, [Offered(0.0, who, (10,)) for who in "abcabc"])
    assert done.loads == 4


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
