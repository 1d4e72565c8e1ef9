"""Who leaves memory: hand-worked cases, laws over random histories, and what a policy is worth on a trace."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.residency import POLICIES, LfuAgeing, Lru, residency_policy
from runtime.residency_simulator import replay
from vbert.errors import ConfigError


def nobody(_: str) -> bool:
    return False


def filled(policy, *entries: tuple[str, int]):
    """The policy after these (digest, bytes) arrived and were used once, at one second a byte."""
    for digest, num_bytes in entries:
        policy.arrived(digest, num_bytes, float(num_bytes))
        policy.used(digest)
    return policy


def rate(policy, requests, budget):
    """Hit rate with modules of one byte."""
    seen = replay(policy, requests, num_bytes=lambda _: 1, load_s=lambda _: 1.0, budget_bytes=budget)
    return seen.hit_rate


@pytest.fixture(params=POLICIES, ids=str)
def policy(request):
    return residency_policy(request.param)


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'fifo' is unknown; use one of lru, lfu"):
        residency_policy("fifo")


def test_nothing_leaves_when_there_is_room(policy):
    assert filled(policy, ("a", 5)).victims(0, nobody) == ()
    assert policy.victims(-7, nobody) == ()


def test_the_longest_unused_leave_as_few_as_are_enough(policy):
    assert filled(policy, ("a", 5), ("b", 5), ("c", 5)).victims(6, nobody) == ("a", "b")


def test_what_must_stay_is_passed_over_and_asking_changes_nothing(policy):
    filled(policy, ("a", 5), ("b", 5))
    for _ in range(3):
        assert policy.victims(5, "a".__eq__) == ("b",)
        assert policy.victims(6, "a".__eq__) is None
        assert policy.victims(6, nobody) == ("a", "b")


def test_lru_goes_by_the_last_use():
    policy = filled(Lru(), ("a", 1), ("b", 1))
    policy.used("a")
    assert policy.victims(1, nobody) == ("b",)


def test_lfu_keeps_what_is_used_often():
    policy = filled(LfuAgeing(), ("often", 1), ("once", 1), ("twice", 1))
    for digest in ("often", "often", "twice"):
        policy.used(digest)
    policy.used("once")  # the latest use of all
    policy.used("often")
    assert policy.victims(3, nobody) == ("twice", "once", "often")


def test_lfu_lets_what_was_popular_once_sink():
    """`star` was used 20 times long ago; modules that each leave after a few uses lift the age past it."""
    policy = filled(LfuAgeing(), ("star", 1))
    for _ in range(20):
        policy.used("star")
    for i in range(1_000):
        policy.arrived(f"m{i}", 1, 1.0)
        policy.used(f"m{i}")
        (victim,) = policy.victims(1, nobody)
        policy.left(victim)
        if victim == "star":
            break
    assert 5 < i < 100


def test_lfu_counts_what_a_load_costs():
    """Of two modules used alike the one leaves first that is cheaper to bring back for its size."""
    policy = LfuAgeing()
    for digest, num_bytes, load_s in (("dear", 10, 10.0), ("cheap", 10, 1.0), ("large", 100, 10.0)):
        policy.arrived(digest, num_bytes, load_s)
        policy.used(digest)
    assert policy.victims(115, nobody) == ("cheap", "large", "dear")


def test_lfu_remembers_uses_of_a_module_that_left():
    policy = filled(LfuAgeing(), ("a", 1))
    for _ in range(10):
        policy.used("a")
    policy.left("a")
    filled(policy, ("a", 1), ("b", 1))
    assert policy.victims(1, nobody) == ("b",)


def test_a_scan_wipes_lru_and_not_lfu():
    hot = [f"hot{i}" for i in range(50)]
    warm = hot * 20
    scan = [f"cold{i}" for i in range(1_000)]
    mixed = list(itertools.chain.from_iterable(zip(scan, hot * 20, strict=True)))
    assert rate(Lru(), warm + mixed, 60) < 0.35  # of `warm` only
    assert rate(LfuAgeing(), warm + mixed, 60) > 0.64  # all but the scan itself and the first 50


@pytest.mark.parametrize("budget", [20, 200])
def test_lfu_finds_more_than_lru_under_zipf(budget):
    ranks = np.arange(1, 2_001) ** -1.1
    requests = np.random.default_rng(0).choice(2_000, 20_000, p=ranks / ranks.sum()).astype(str).tolist()
    assert rate(LfuAgeing(), requests, budget) > rate(Lru(), requests, budget) + 0.01


def test_a_module_above_the_budget_stays_out(policy):
    seen = replay(policy, ["big", "a", "a"], num_bytes=len, load_s=float, budget_bytes=2)
    assert (seen.requests, seen.hits, seen.loaded_bytes, seen.evictions) == (3, 1, 4, 0)
    assert seen.load_s == 4.0


def test_pins_and_hints_in_a_replay(policy):
    """Two modules fit: the pinned one stays, the prefetched one is a hit, the third never gets in for long."""
    requests = ["a", "b", "c", "a", "c", "a"]
    how = {"num_bytes": lambda _: 1, "load_s": lambda _: 1.0, "budget_bytes": 2}
    seen = replay(policy, requests, pinned={"a"}, prefetched=["a", "b", "c"], **how)
    assert (seen.hits, seen.loaded_bytes, seen.evictions) == (5, 1, 1)
    everything = replay(residency_policy("lru"), ["a", "b"], pinned={"a"}, **(how | {"budget_bytes": 1}))
    assert (everything.hits, everything.loaded_bytes) == (0, 2)


STEPS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), max_size=120)


@given(STEPS, st.integers(9, 40), st.sampled_from(sorted(POLICIES)), st.integers(0, 12))
def test_laws(steps, budget, name, kept):
    """The budget holds, victims are resident, distinct, not kept, and as few as are enough; None only if they must."""
    policy, resident = residency_policy(name), {}

    def keep(digest: str) -> bool:
        return digest == f"m{kept}"

    for number, size in steps:
        digest = f"m{number}"
        if digest not in resident:
            need = size - (budget - sum(resident.values()))
            victims = policy.victims(need, keep)
            movable = sum(held for other, held in resident.items() if not keep(other))
            assert (victims is None) == (movable < need)
            if victims is None:
                continue
            assert len(set(victims)) == len(victims)
            assert not any(map(keep, victims))
            freed = [resident[victim] for victim in victims]
            assert sum(freed) >= need
            assert not freed or sum(freed[:-1]) < need
            for victim in victims:
                policy.left(victim)
                del resident[victim]
            resident[digest] = size
            policy.arrived(digest, size, 1.0)
        policy.used(digest)
        assert sum(resident.values()) <= budget
