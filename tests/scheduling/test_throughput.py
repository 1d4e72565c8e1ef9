from __future__ import annotations

import pytest

from runtime.throughput import Throughput


def test_nothing_is_known_before_the_first_batch():
    assert Throughput().seconds(100) is None
    assert Throughput().tokens_per_s(100) is None


def test_batches_of_one_size_are_taken_as_proportional():
    throughput = Throughput()
    for _ in range(5):
        throughput.observe(100, 0.1)
    assert throughput.seconds(200) == pytest.approx(0.2)


def test_fixed_and_proportional_parts_are_told_apart():
    throughput = Throughput()
    for tokens in (10, 1000, 200, 4000, 50, 2000):
        throughput.observe(tokens, 0.005 + tokens * 1e-5)
    assert throughput.seconds(500) == pytest.approx(0.01)
    assert throughput.tokens_per_s(4000) == pytest.approx(4000 / 0.045)


def test_a_machine_that_becomes_slow_is_noticed():
    throughput = Throughput()
    for _ in range(50):
        throughput.observe(1000, 0.1)
    for _ in range(20):
        throughput.observe(1000, 1.0)
    assert throughput.seconds(1000) > 0.85


def test_times_that_fall_with_size_never_give_a_negative_estimate():
    throughput = Throughput()
    for tokens, seconds in ((10, 1.0), (5000, 0.1)):
        throughput.observe(tokens, seconds)
    assert throughput.seconds(100_000) > 0


def profile(tokens: int) -> float:
    return 0.01 + tokens * 1e-4


def test_a_profile_answers_before_the_first_batch():
    throughput = Throughput(profile)
    assert throughput.seconds(100) == pytest.approx(0.02)
    assert throughput.tokens_per_s(100) == pytest.approx(5000)


def test_a_machine_slower_than_its_profile_corrects_all_sizes():
    throughput = Throughput(profile)
    for tokens in (100, 4000, 30) * 10:
        throughput.observe(tokens, 3 * profile(tokens))
    assert throughput.ratio == pytest.approx(3)
    assert throughput.seconds(2000) == pytest.approx(3 * profile(2000))


def test_a_neighbour_that_left_is_forgotten():
    throughput = Throughput(profile)
    throughput.observe(1000, 20 * profile(1000))
    for _ in range(60):
        throughput.observe(1000, profile(1000))
    assert throughput.seconds(1000) == pytest.approx(profile(1000), rel=0.1)
