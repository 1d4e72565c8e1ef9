"""Ready means: answers come and are right. A full queue is not an illness, a stuck one is."""

from __future__ import annotations

import asyncio

import pytest

from runtime.errors import ServerFull
from runtime.health import Health
from runtime.metrics import SECONDS, Histogram
from tests.fakes import GatedPolicy, ManualClock
from tests.serving.helpers import until, waiting
from vbert.errors import SelfTestFailed


class Probe:
    """Asks nothing, says what the test wants."""

    def __init__(self) -> None:
        self.clock, self.error, self.since_s = ManualClock(), None, None
        self.health = Health(
            ask=self.ask, waiting_since_s=lambda: self.since_s, loop_lag=Histogram(SECONDS), clock=self.clock
        )

    async def ask(self):
        self.clock.now += 0.5
        if self.error is not None:
            raise self.error


async def test_not_ready_before_the_first_answer():
    probe = Probe()
    assert not probe.health.report(None).ready
    await probe.health.canary()
    report = probe.health.report(None)
    assert report.ready
    assert report.canary == {"ok": True, "age_s": 0.0, "duration_s": 0.5, "error": None}


async def test_wrong_numbers_are_not_ready_and_right_ones_are_again():
    probe = Probe()
    probe.error = SelfTestFailed("off by 1")
    await probe.health.canary()
    assert probe.health.report(None).reasons == ("canary: off by 1",)
    probe.error = None
    await probe.health.canary()
    assert probe.health.report(None).ready


async def test_overload_says_nothing():
    probe = Probe()
    await probe.health.canary()
    probe.error = ServerFull("full")
    await probe.health.canary()
    assert probe.health.report(None).ready


async def test_work_that_does_not_move_is_not_ready():
    probe = Probe()
    await probe.health.canary()
    probe.since_s = probe.clock.now
    probe.clock.now += 29.0
    assert probe.health.report(None).ready
    probe.clock.now += 2.0
    report = probe.health.report(None)
    assert report.reasons == ("watchdog: work waits and nothing was finished for 31.0 s",)
    assert report.watchdog["stalled_s"] == 31.0


async def test_an_engine_that_computes_nothing_for_long_is_not_ready(serving):
    clock, policy = ManualClock(), GatedPolicy()
    async with serving(clock=clock, policy=policy, default_deadline_s=1000.0) as engine:
        policy.open = False
        asked = asyncio.create_task(engine.embed("tiny", ["a"]))
        await waiting(engine, 1)
        assert engine.ready().ready
        clock.now += 31.0
        assert "nothing was finished" in engine.ready().reasons[0]
        policy.open = True
        await asked
        assert engine.ready().ready


async def test_canaries_pass_through_the_queue_every_few_seconds(serving):
    async with serving(canary_interval_s=0.01) as engine:
        await until(lambda: engine.snapshot().requests["canary", "ok"] >= 3)
        parts = engine._core.parts
        parts.canary.expected.add_(0.1)  # as if the weights in memory had changed
        await until(lambda: not engine.ready().ready)
        assert "self-test 0 is off by" in engine.ready().reasons[0]


async def test_a_backbone_that_answers_wrongly_does_not_start(config, monkeypatch):
    from runtime import Engine, core

    def off(tests, outputs, dtype):
        raise SelfTestFailed("off by 1")

    monkeypatch.setattr(core, "check_outputs", off)
    with pytest.raises(SelfTestFailed, match="backbone does not answer as it should: off by 1"):
        await Engine(config()).start()


async def test_loop_lag_is_measured(serving):
    async with serving() as engine:
        await until(lambda: engine.snapshot().loop_lag.count >= 2)
        assert 0 <= engine.snapshot().loop_lag.p99 < 5


async def test_a_broken_loop_fails_everybody_instead_of_hanging(serving):
    policy = GatedPolicy()
    async with serving(policy=policy) as engine:
        policy.open = False
        asked = asyncio.create_task(engine.embed("tiny", ["a"]))
        await waiting(engine, 1)
        policy.inner = None  # a bug in a policy
        from runtime.errors import ComputeFailed

        with pytest.raises(ComputeFailed, match="the engine broke"):
            await asked
        assert not engine.ready().ready
        with pytest.raises(ComputeFailed):
            await engine.embed("tiny", ["a"])
