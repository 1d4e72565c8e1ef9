"""The number of operator streams follows what was measured, and one stream is where it begins."""

from __future__ import annotations

from collections import deque

import pytest

from runtime import EngineConfig
from runtime.operator_streams import StreamChoice
from vbert.errors import ConfigError
from vbert.stream_counts import MAX_STREAMS, stream_counts


def run(choice, seconds, batches, *, tokens=2000, groups=4, ahead=0):
    """seconds: of a batch, by streams. ahead: batches that are issued before the time of one is known."""
    chosen, in_flight = [], deque()
    for _ in range(batches):
        chosen.append(choice.choose(tokens, groups))
        in_flight.append(chosen[-1])
        if len(in_flight) > ahead:
            count = in_flight.popleft()
            choice.observe(count, tokens, groups, seconds[count])
    return chosen


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_it_begins_with_one_stream_tries_each_and_keeps_the_fastest(ahead):
    chosen = run(StreamChoice(), {1: 3e-3, 2: 2e-3, 4: 2.5e-3}, 200, ahead=ahead)
    assert chosen[:3] == [1, 2, 4]
    assert chosen.count(2) >= 180


def test_where_streams_only_cost_one_stays_and_tries_get_rarer():
    seconds = {1: 2e-3, 2: 2.2e-3, 4: 2.6e-3}
    choice = StreamChoice()
    chosen = run(choice, seconds, 2000)
    assert sum(seconds[count] for count in chosen) < 1.01 * 2000 * seconds[1]
    assert run(choice, seconds, 1000).count(1) >= 998


def test_what_became_slower_is_left():
    choice = StreamChoice()
    run(choice, {1: 3e-3, 2: 2e-3, 4: 2.5e-3}, 100)
    chosen = run(choice, {1: 3e-3, 2: 5e-3, 4: 5e-3}, 200)
    assert chosen[-100:].count(1) >= 97


def test_a_clock_that_stands_still_hurts_nobody():
    assert set(run(StreamChoice(), {1: 0.0, 2: 0.0, 4: 0.0}, 100)) == {1, 2, 4}


def test_sizes_and_numbers_of_groups_are_learned_apart():
    choice = StreamChoice()
    small, large = {1: 2e-3, 2: 1e-3, 4: 1e-3}, {1: 1e-3, 2: 2e-3, 4: 2e-3}
    run(choice, small, 20, tokens=100)
    assert run(choice, large, 16, tokens=4000)[3:] == [1] * 13
    assert run(choice, small, 4, tokens=100).count(1) <= 1
    assert run(choice, {1: 1e-3, 2: 2e-3, 3: 2e-3}, 4, tokens=100, groups=3) == [1, 2, 3, 1]


def test_numbers_of_streams_worth_a_try():
    assert [stream_counts(n) for n in (1, 2, 3, 4)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4)]
    assert stream_counts(5) == (1, 2, 4, 5)
    assert stream_counts(MAX_STREAMS) == stream_counts(100) == (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize("count", [-1, MAX_STREAMS + 1])
def test_a_number_that_there_is_not(count):
    with pytest.raises(ConfigError, match="operator_streams"):
        EngineConfig(operator_streams=count)
