"""Who may wait, with what and for how long."""

from __future__ import annotations

import asyncio

import pytest

from runtime.errors import DeadlineExceeded, QueueFull, RequestTooLarge, ServerFull
from tests.fakes import GatedPolicy, ManualClock
from tests.serving.helpers import add, held, outcome, until, waiting
from tests.tiny import TEXTS
from vbert.errors import BadRequest, InputTooLong, UnknownTenant, WrongTask

LONG = "word " * 100


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "empty"),
        ("one text", "send a list"),
        (None, "send a list"),
        ({"a": 1}, "send a list"),
        ([""], "input 0 is empty"),
        (["fine", "  \n"], "input 1 is empty"),
        ([("a", "")], "input 0 is empty"),
        ([[]], "input 0 is empty"),
        ([7], "input 0 is of type int"),
        ([b"bytes"], "input 0 is of type bytes"),
        ([None], "input 0 is of type NoneType"),
        ([("a", "b", "c")], "not two texts"),
        ([("a", 1)], "not two texts"),
        (["a lone \ud800 surrogate"], "not valid Unicode"),
        ([["mixed", 3]], "send strings"),
        ([[5, True]], "token id True"),
        ([[5, -1]], "token id -1"),
        ([[5, 300]], "token id 300"),
    ],
)
async def test_bad_input_is_refused_by_name(serving, inputs, message):
    async with serving() as engine:
        with pytest.raises(BadRequest, match=message) as caught:
            await engine.embed("tiny", inputs)
        assert type(caught.value) is BadRequest
        assert caught.value.param == "input"
        assert (await engine.embed("tiny", ["no"])).tokens == (3,)


async def test_too_much_is_refused_with_the_limit(serving):
    async with serving(max_request_inputs=4, max_input_chars=1000) as engine:
        with pytest.raises(RequestTooLarge, match="5 inputs, the limit is 4"):
            await engine.embed("tiny", ["a"] * 5)
        with pytest.raises(RequestTooLarge, match="1001 characters, the limit is 1000"):
            await engine.embed("tiny", ["a" * 1001])
        with pytest.raises(RequestTooLarge, match="1002 characters"):
            await engine.embed("tiny", [("a" * 501, "b" * 501)])


async def test_a_priority_that_there_is_not_is_refused(serving):
    async with serving() as engine:
        assert (await engine.embed("tiny", ["no"], priority="batch")).tokens == (3,)
        with pytest.raises(BadRequest, match="priority is 'urgent'; give interactive or batch") as caught:
            await engine.embed("tiny", ["no"], priority="urgent")
        assert caught.value.param == "priority"


async def test_a_tenant_with_more_weight_gets_on_faster(serving, factory):
    """Both have the same waiting; of the first batches the one with weight 3 has three times as much."""
    policy = GatedPolicy()
    async with serving(policy=policy, max_batch_tokens=40, tenant_weights=("heavy=3",)) as engine:
        for tenant in ("heavy", "light"):
            await add(engine, tenant, factory.tenant("lora"))
            await engine.classify(tenant, ["no"])  # its module is in memory
        done: list[str] = []

        async def ask(tenant):
            await engine.classify(tenant, ["no"])
            done.append(tenant)

        policy.open = False
        tasks = [asyncio.create_task(ask(tenant)) for _ in range(40) for tenant in ("light", "heavy")]
        await waiting(engine, 80)
        policy.open = True
        await asyncio.gather(*tasks)
    assert 0.65 <= done[:40].count("heavy") / 40 <= 0.85


async def test_a_method_the_tenant_does_not_serve(serving, factory):
    async with serving() as engine:
        await add(engine, "c", factory.tenant("lora"))
        await add(engine, "n", factory.tenant(head="token_classify"))
        with pytest.raises(WrongTask, match="'c' serves classify, not embed"):
            await engine.embed("c", TEXTS)
        with pytest.raises(WrongTask, match="'n' serves token_classify, not rerank"):
            await engine.rerank("n", "q", ["d"])
        with pytest.raises(WrongTask, match="'tiny' serves embed, not classify"):
            await engine.classify("tiny", TEXTS)
        with pytest.raises(BadRequest, match="takes a text or a list of words"):
            await engine.token_classify("n", [("a", "b")])
        with pytest.raises(UnknownTenant, match="nobody"):
            await engine.embed("nobody", TEXTS)
        with pytest.raises(UnknownTenant):
            await engine.embed("../../etc/passwd", TEXTS)


@pytest.mark.parametrize(
    ("query", "documents", "top_n", "message"),
    [
        (3, ["d"], None, "query"),
        ("q", "one document", None, "documents"),
        ("q", [], None, "documents"),
        ("q", ["d", 4], None, "document 1"),
        ("q", ["d"], 0, "top_n"),
        ("q", ["d"], True, "top_n"),
        ("q", [" "], None, "input 0 is empty"),
    ],
)
async def test_bad_rerank_requests(serving, factory, query, documents, top_n, message):
    async with serving() as engine:
        await add(engine, "r", factory.tenant(head="rerank"))
        with pytest.raises(BadRequest, match=message):
            await engine.rerank("r", query, documents, top_n=top_n)


async def test_score_takes_pairs_only(serving, factory):
    async with serving() as engine:
        await add(engine, "r", factory.tenant(head="rerank"))
        with pytest.raises(BadRequest, match="not a pair"):
            await engine.score("r", ["no pair"])


async def test_too_long_names_both_lengths_and_truncate_says_so(serving, factory):
    from dataclasses import replace

    async with serving() as engine:
        await add(engine, "short", replace(factory.tenant("lora"), max_length=16))
        with pytest.raises(InputTooLong, match=r"input 1 has \d+ tokens, the backbone takes 66"):
            await engine.embed("tiny", ["ok", LONG])
        with pytest.raises(InputTooLong, match=r"tokens, tenant 'short' takes 16"):
            await engine.classify("short", [LONG])
        cut = await engine.classify("short", ["ok", LONG], truncate=True)
        assert cut.truncated == (False, True)
        assert cut.tokens[1] == 16
        assert (await engine.embed("tiny", [LONG], truncate=True)).tokens == (66,)


async def test_long_texts_are_tokenised_beside_the_loop(serving):
    async with serving(max_input_chars=300_000, max_request_inputs=64) as engine:
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        answer = await engine.embed("tiny", ["word " * 20_000] * 3, truncate=True)
        ticking.cancel()
        assert answer.truncated == (True,) * 3
        assert ticks > 3


async def test_the_queue_is_bounded_for_one_caller_and_for_all(serving):
    policy = GatedPolicy()
    async with serving(policy=policy, max_queue_inputs=10, max_caller_share=0.5) as engine:
        policy.open = False
        first = asyncio.create_task(engine.embed("tiny", ["a"] * 5, caller="x"))
        await waiting(engine, 5)
        with pytest.raises(QueueFull, match="5 inputs of this caller wait, 5 may") as full:
            await engine.embed("tiny", ["a"], caller="x")
        assert full.value.retry_after_s > 0
        second = asyncio.create_task(engine.embed("tiny", ["a"] * 4, caller="y"))
        await waiting(engine, 9)
        with pytest.raises(ServerFull, match="9 inputs wait, 10 may"):
            await engine.embed("tiny", ["a"] * 2, caller="z")
        with pytest.raises(RequestTooLarge, match="6 inputs, one caller may queue 5"):
            await engine.embed("tiny", ["a"] * 6, caller="z")
        assert engine.ready().ready  # full is not ill
        policy.open = True
        await asyncio.gather(first, second)
        await engine.embed("tiny", ["a"] * 5, caller="x")


async def test_retry_after_is_the_measured_time_until_there_is_room(serving):
    policy = GatedPolicy()
    async with serving(policy=policy, max_queue_inputs=20, max_caller_share=1.0) as engine:
        await engine.embed("tiny", ["a"] * 20)
        policy.open = False
        asked = asyncio.create_task(engine.embed("tiny", ["a"] * 20))
        await waiting(engine, 20)
        with pytest.raises(QueueFull) as full:
            await engine.embed("tiny", ["a"] * 10)
        now = engine.snapshot()
        assert full.value.retry_after_s == pytest.approx(now.queue_tokens / now.tokens_per_s / 2)
        policy.open = True
        await asked


async def test_a_request_past_its_deadline_is_answered_on_time_and_never_computed(serving):
    clock, policy = ManualClock(100.0), GatedPolicy()
    async with serving(clock=clock, policy=policy) as engine:
        policy.open = False
        short = asyncio.create_task(engine.embed("tiny", ["a"], deadline_s=2.0))
        long = asyncio.create_task(engine.embed("tiny", ["b"]))
        await waiting(engine, 2)
        batches = engine.snapshot().batches
        clock.now += 2.0
        with pytest.raises(DeadlineExceeded, match="within the 2 s"):
            await short
        assert engine.snapshot().queue_inputs == 1
        policy.open = True
        await long
        assert engine.snapshot().batches == batches + 1
        assert engine.snapshot().requests["embed", "deadline_exceeded"] == 1


@pytest.mark.parametrize("deadline_s", [0, -1, float("nan"), float("inf"), "soon", True])
async def test_a_deadline_is_a_time_ahead(serving, deadline_s):
    async with serving() as engine:
        with pytest.raises(BadRequest, match="deadline_s"):
            await engine.embed("tiny", ["a"], deadline_s=deadline_s)


async def test_a_caller_that_left_is_not_computed(serving):
    policy = GatedPolicy()
    async with serving(policy=policy) as engine:
        policy.open = False
        gone = asyncio.create_task(engine.embed("tiny", TEXTS))
        stays = asyncio.create_task(engine.embed("tiny", ["a"]))
        await waiting(engine, len(TEXTS) + 1)
        gone.cancel()
        await until(lambda: engine.snapshot().queue_inputs == 1)
        policy.open = True
        await stays
        assert engine.snapshot().computed_inputs["backbone"] == 2  # with the canary of the start
        assert engine.snapshot().requests["embed", "cancelled"] == 1


async def test_a_caller_that_left_after_the_launch_is_not_counted_as_computed(serving):
    async with serving() as engine:
        with held(engine._core.lanes.rows):
            gone = asyncio.create_task(engine.embed("tiny", TEXTS))
            await until(lambda: engine.snapshot().in_flight_batches == 1)
            gone.cancel()
            await until(gone.done)
        await engine.embed("tiny", ["a"])
        assert engine.snapshot().computed_inputs["backbone"] == 2  # with the canary of the start


async def test_a_request_in_pieces_is_answered_as_a_whole(serving):
    async with serving(max_batch_tokens=16) as engine:
        whole = await engine.embed("tiny", TEXTS * 3)
        assert engine.snapshot().batches > len(TEXTS)
        alone = [await engine.embed("tiny", [text]) for text in TEXTS]
    for i, embedding in enumerate(whole.embeddings):
        assert embedding == pytest.approx(alone[i % len(TEXTS)].embeddings[0], abs=1e-5)


async def test_many_callers_at_once(serving):
    async with serving(max_batch_tokens=256) as engine:
        answers = await asyncio.gather(*[outcome(engine.embed("tiny", [TEXTS[i % 7]])) for i in range(300)])
        assert not [answer for answer in answers if isinstance(answer, Exception)]
        assert engine.snapshot().batches < 150
