"""The number of compute threads follows what was measured."""

from __future__ import annotations

import random

import pytest

from runtime.threads import ThreadChoice
from runtime.wait_policy import log_collapse


def run(choice: ThreadChoice, seconds, batches: int, tokens: int = 2000) -> list[int]:
    """seconds: time of a batch by thread count. Returns the counts chosen."""
    chosen = []
    for _ in range(batches):
        count = choice.choose(tokens)
        choice.observe(count, tokens, seconds[count])
        chosen.append(count)
    return chosen


QUIET, BUSY = {1: 0.13, 2: 0.07}, {1: 0.14, 2: 1.2}


def test_a_fixed_count_stays():
    assert set(run(ThreadChoice((3,)), {3: 0.1}, 100)) == {3}


def test_every_count_is_tried_and_the_fastest_kept():
    chosen = run(ThreadChoice.up_to(2), QUIET, 1000)
    assert chosen[:2] == [2, 1]
    assert chosen.count(1) <= 8


def test_a_busy_neighbour_is_noticed_at_once_and_costs_little():
    choice = ThreadChoice.up_to(2)
    run(choice, QUIET, 100)
    chosen = run(choice, BUSY, 1000)
    assert set(chosen[2:10]) == {1}
    assert sum(BUSY[count] for count in chosen) < 1.03 * 1000 * BUSY[1]
    assert run(choice, BUSY, 5000).count(2) <= 5


def test_a_neighbour_that_left_is_noticed():
    for batches in (100, 5000):
        choice = ThreadChoice.up_to(2)
        run(choice, BUSY, batches)
        chosen = run(choice, QUIET, 1200)
        assert chosen[-100:].count(2) >= 98


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3, 0.6, 0.9])
def test_a_neighbour_that_comes_and_goes_hurts_few_batches(share):
    """Most tries succeed, and soon afterwards a batch collapses. A p99 must not be made of them."""
    chance, choice, collapsed = random.Random(0), ThreadChoice.up_to(2), 0
    for _ in range(10_000):
        seconds = BUSY if chance.random() < share else QUIET
        collapsed += run(choice, seconds, 1) == [2] and seconds is BUSY
    assert collapsed < 50


def test_one_slow_batch_changes_nothing():
    choice = ThreadChoice.up_to(2)
    run(choice, QUIET, 100)
    run(choice, {1: 0.13, 2: 0.25}, 1)
    assert run(choice, QUIET, 10) == [2] * 10


def test_one_collapsed_batch_after_a_quiet_time_is_forgotten_soon():
    choice = ThreadChoice.up_to(2)
    run(choice, QUIET, 3000)
    run(choice, {1: 5.0, 2: 5.0}, 1)
    assert run(choice, QUIET, 60)[-40:].count(2) >= 39


def test_a_cold_start_is_forgotten_soon():
    choice = ThreadChoice.up_to(2)
    run(choice, {1: 5.0, 2: 5.0}, 1)
    assert run(choice, QUIET, 60)[-40:].count(2) >= 39


def test_sizes_are_judged_apart():
    choice = ThreadChoice.up_to(2)
    run(choice, QUIET, 20)
    run(choice, {1: 0.004, 2: 0.006}, 20, tokens=30)
    assert (choice.choose(2000), choice.choose(30)) == (2, 1)


def test_a_clock_that_did_not_move():
    assert set(run(ThreadChoice.up_to(2), {1: 0.0, 2: 0.0}, 100)) == {1, 2}


def test_counts_of_larger_machines():
    assert run(ThreadChoice.up_to(16), {16: 0.03, 8: 0.02, 1: 0.1}, 10) == [16, 8, 1, *[8] * 7]
    assert set(run(ThreadChoice.up_to(1), {1: 0.1}, 100)) == {1}


def test_a_collapse_is_told_once():
    told = []
    choice = ThreadChoice.up_to(2, lambda *what: told.append(what))
    run(choice, QUIET, 100)
    assert told == []
    run(choice, BUSY, 500)
    ((count, times),) = told
    assert (count, round(times)) == (2, round(BUSY[2] / 0.13))


def test_one_thread_never_collapses():
    told = []
    choice = ThreadChoice.up_to(2, lambda *what: told.append(what))
    run(choice, {1: 0.1, 2: 0.05}, 20)
    run(choice, {1: 9.0, 2: 0.05}, 200)
    assert told == []


@pytest.mark.parametrize(("policy", "lines"), [("", 1), ("ACTIVE", 1), ("passive", 0)])
def test_the_remedy_is_logged_where_there_is_one(monkeypatch, caplog, policy, lines):
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    log_collapse(2, 9.2)
    assert caplog.text.count("OMP_WAIT_POLICY=PASSIVE, set before torch is imported") == lines


def test_a_lane_has_its_count_or_a_choice():
    assert ThreadChoice.of_lane(3, 8).counts == (3,)
    assert ThreadChoice.of_lane(0, 8).counts == (8, 4, 1)
