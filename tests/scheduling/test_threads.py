"""The number of compute threads follows what was measured."""

from __future__ import annotations

from runtime.threads import ThreadChoice


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
    assert sum(BUSY[count] for count in chosen) < 1.15 * 1000 * BUSY[1]


def test_a_neighbour_that_left_is_noticed():
    choice = ThreadChoice.up_to(2)
    run(choice, BUSY, 100)
    chosen = run(choice, QUIET, 600)
    assert chosen[-100:].count(2) >= 98


def test_sizes_are_judged_apart():
    choice = ThreadChoice.up_to(2)
    run(choice, QUIET, 20)
    run(choice, {1: 0.004, 2: 0.006}, 20, tokens=30)
    assert (choice.choose(2000), choice.choose(30)) == (2, 1)


def test_counts_of_larger_machines():
    assert run(ThreadChoice.up_to(16), {16: 0.03, 8: 0.02, 1: 0.1}, 10) == [16, 8, 1, *[8] * 7]
    assert set(run(ThreadChoice.up_to(1), {1: 0.1}, 100)) == {1}
