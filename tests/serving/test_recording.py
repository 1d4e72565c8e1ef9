"""The log of requests that a server writes, and what is refused because it could not be in time."""

from __future__ import annotations

import asyncio

import pytest

from runtime.errors import DeadlineExceeded, DeadlineUnreachable
from runtime.request_log import read_log
from tests.fakes import GatedPolicy
from tests.serving.helpers import outcome, waiting
from vbert.checkpoint import write_tenant
from vbert.errors import ConfigError


async def test_a_server_writes_what_it_was_asked(serving, tmp_path):
    async with serving(record=str(tmp_path / "log")) as engine:
        await engine.embed("tiny", ["no", "two words"], priority="batch")
        await asyncio.gather(*(engine.embed("tiny", ["no"], deadline_s=9.0) for _ in range(3)))
        assert await outcome(engine.embed("tiny", ["no"], deadline_s=1e-6)) is not None
    log = read_log(tmp_path / "log")
    assert (log.about["name"], log.about["policy"]) == ("tiny", "fair")
    assert [request.tenant for request in log.requests] == ["tiny"] * 5
    assert (log.requests[0].lengths, log.requests[0].priority) == ((3, 4), "batch")
    assert log.requests[1].deadline_s == pytest.approx(9.0)
    assert all(seconds > 0 for seconds in log.total_s[:4])
    assert log.total_s[4] != log.total_s[4]
    assert log.batches[0][:3] == (7, 2, 1)
    assert sum(batch.inputs for batch in log.batches) == 5
    assert "two words" not in (tmp_path / "log").read_text()


async def test_a_restart_keeps_what_was_recorded(serving, tmp_path):
    for _ in range(3):
        async with serving(record=str(tmp_path / "log")) as engine:
            await engine.embed("tiny", ["no"])
    assert sorted(path.name for path in tmp_path.glob("log*")) == ["log", "log.1", "log.2"]
    assert all(len(read_log(path).requests) == 1 for path in tmp_path.glob("log*"))


async def test_a_log_that_cannot_be_written_is_said_at_the_start(serving, tmp_path):
    with pytest.raises(ConfigError, match=r"the request log .* cannot be written"):
        async with serving(record=str(tmp_path / "no" / "log")):
            pass


async def test_who_cannot_be_in_time_is_refused_at_once(serving, monkeypatch):
    """At 100 tokens a second 40 inputs of 3 tokens take more than a second. Who has 0.5 s is told so, and when to come
    back; who asks for too much at once is told that it is too much."""
    policy = GatedPolicy()
    async with serving(policy=policy, max_batch_tokens=8) as engine:
        await engine.embed("tiny", ["no"])
        monkeypatch.setattr(engine._core.pipeline, "tokens_per_s", lambda batch_tokens: 100.0)
        policy.open = False
        others = [asyncio.create_task(engine.embed("tiny", ["no"])) for _ in range(40)]
        await waiting(engine, 40)
        error = await outcome(engine.embed("tiny", ["no"], deadline_s=0.5))
        assert isinstance(error, DeadlineUnreachable)
        assert error.retry_after_s == pytest.approx(0.8, abs=0.25)
        assert isinstance(await outcome(engine.embed("tiny", ["no"] * 40, deadline_s=0.5)), DeadlineExceeded)
        patient = asyncio.create_task(engine.embed("tiny", ["no"], deadline_s=20.0))
        await waiting(engine, 41)
        policy.open = True
        await asyncio.gather(*others, patient)


async def test_a_tenant_is_not_refused_for_what_another_one_waits_for(serving, factory, monkeypatch):
    """By shares, the request of another tenant goes before most of the flood, and is admitted."""
    policy = GatedPolicy()
    async with serving(policy=policy, max_batch_tokens=16) as engine:
        await engine.add_tenant("flood", write_tenant(factory.tenant("lora", head="embed")))
        await engine.embed("flood", ["no"])
        await engine.embed("tiny", ["no"])
        monkeypatch.setattr(engine._core.pipeline, "tokens_per_s", lambda batch_tokens: 100.0)
        policy.open = False
        others = [asyncio.create_task(engine.embed("flood", ["no"])) for _ in range(60)]
        await waiting(engine, 60)
        mine = asyncio.create_task(engine.embed("tiny", ["no"], deadline_s=1.0))
        await waiting(engine, 61)
        assert isinstance(await outcome(engine.embed("flood", ["no"], deadline_s=1.0)), DeadlineUnreachable)
        policy.open = True
        await asyncio.gather(*others, mine)
