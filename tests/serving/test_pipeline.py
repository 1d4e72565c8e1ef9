"""The compute lane: what is wrong with one tenant stays its own trouble."""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from runtime.clock import MonotonicClock
from runtime.errors import ComputeFailed
from runtime.forwards import Forwards
from runtime.launch import Computed
from runtime.metrics import Metrics
from runtime.pipeline import Pipeline
from runtime.pressure import MemoryPressure
from runtime.streams import CpuDevice
from runtime.threads import ThreadChoice
from runtime.throughput import Throughput
from tests.fakes import ManualClock
from tests.serving.helpers import Dense
from vbert.arena import Arena
from vbert.checkpoint import write_tenant
from vbert.header import parse_header
from vbert.model import Model, SequenceInput
from vbert.reference import dense_forward

WIDE = torch.float32, torch.device("cpu")


class FlakyModel(Model):
    """Raises when the tenants in `raises` are in a batch; gives NaN for sequences that begin with `poison`."""

    raises: frozenset[str] = frozenset()
    poison = -1

    def launch(self, batch, feed=None):
        if {tenant.digest for tenant in batch.tenants} & self.raises:
            raise RuntimeError("out of luck")
        outputs = super().launch(batch, feed)()
        starts = [int(batch.rows.token_ids[batch.rows.cu_seqlens[j]]) for j in range(len(batch.order))]
        for j, i in enumerate(batch.order):
            if starts[j] == self.poison:
                outputs[i] = outputs[i] * float("nan")
        return lambda: outputs


@pytest.fixture
def model(backbone):
    return FlakyModel(backbone, *WIDE)


def make_pipeline(model, lane, threads):
    clock = MonotonicClock()
    forwards = Forwards(model, CpuDevice(clock), lane, clock=clock, threads=threads)
    return Pipeline(forwards, MemoryPressure(4096, clock), clock, Metrics())


@pytest.fixture
async def pipeline(model):
    with ThreadPoolExecutor(1) as lane:
        yield make_pipeline(model, lane, ThreadChoice((1,)))


@pytest.fixture
def tenants(backbone, factory, tmp_path):
    """Three modules in an arena, and the arena."""
    arena, resident = Arena(backbone.config, backbone.fingerprint, torch.float32, 2**20), []
    for i, module in enumerate(factory.tenant(kind) for kind in ("lora", "houlsby", "mask")):
        import hashlib

        data = write_tenant(module)
        path = tmp_path / f"{i}.safetensors"
        path.write_bytes(data)
        reservation = arena.reserve(parse_header(data), hashlib.sha256(data).hexdigest())
        resident.append((module, arena.fill(reservation, path)))
    return arena, resident


async def run(pipeline, sequences):
    done = asyncio.get_running_loop().create_future()
    pipeline.launch(sequences, lambda computed: done.set_result(computed.outcomes))
    return await done


def sequences(resident, ids=(5, 6, 7)):
    return [SequenceInput(list(ids), [0] * len(ids), tenant) for _, tenant in resident for _ in range(2)]


async def test_a_batch_gives_the_dense_answers(pipeline, tenants, backbone):
    _, resident = tenants
    outcomes = await run(pipeline, sequences(resident))
    dense = Dense(backbone)
    for i, outcome in enumerate(outcomes):
        torch.testing.assert_close(
            outcome, torch.from_numpy(dense.raw(resident[i // 2][0], [[5, 6, 7]])[0]), atol=1e-4, rtol=0
        )


class Told(ThreadChoice):
    """One thread; remembers what it was asked and told."""

    def __init__(self):
        super().__init__((1,))
        self.seen = []

    def choose(self, tokens):
        self.seen.append("choose")
        return super().choose(tokens)

    def observe(self, count, tokens, seconds):
        self.seen.append("observe")
        super().observe(count, tokens, seconds)


async def test_threads_are_chosen_when_the_batch_before_is_known(model, tenants):
    """Batches are launched ahead of time; one that collapses must not draw the next into it."""
    threads = Told()
    with ThreadPoolExecutor(1) as lane:
        pipeline = make_pipeline(model, lane, threads)
        await asyncio.gather(*[run(pipeline, sequences(tenants[1])) for _ in range(3)])
    assert threads.seen == ["choose", "observe"] * 3


async def test_a_tenant_that_raises_fails_alone(pipeline, model, tenants):
    _, resident = tenants
    fine = await run(pipeline, sequences(resident))
    model.raises = frozenset({resident[1][1].digest})
    outcomes = await run(pipeline, sequences(resident))
    assert [isinstance(o, ComputeFailed) for o in outcomes] == [False, False, True, True, False, False]
    assert "out of luck" in outcomes[2].message
    for outcome, expected in zip(outcomes, fine, strict=True):
        if not isinstance(outcome, ComputeFailed):
            torch.testing.assert_close(outcome, expected, atol=1e-5, rtol=0)
    assert pipeline._metrics.reruns == 1
    assert pipeline.in_flight == 0


async def test_an_input_that_overflows_fails_alone(pipeline, model, tenants):
    _, resident = tenants
    model.poison = 9
    odd = sequences(resident)
    odd[3] = SequenceInput([9, 6], [0, 0], resident[1][1])
    outcomes = await run(pipeline, odd)
    assert [isinstance(o, ComputeFailed) for o in outcomes] == [False, False, False, True, False, False]
    assert "not finite" in outcomes[3].message


async def test_a_tenant_whose_slots_changed_hands_gets_no_answer(pipeline, tenants):
    arena, resident = tenants
    arena.release(resident[0][1])
    arena.reserve(resident[0][1].header, "somebody else")
    outcomes = await run(pipeline, sequences(resident))
    assert [isinstance(o, ComputeFailed) for o in outcomes] == [True, True, False, False, False, False]
    assert "changed hands" in outcomes[0].message


async def test_a_sequence_that_cannot_be_packed_is_a_failed_batch_not_a_dead_lane(pipeline, tenants):
    _, resident = tenants
    bad = [SequenceInput([10_000], [0], None), *sequences(resident)]
    outcomes = await run(pipeline, bad)
    assert [isinstance(o, ComputeFailed) for o in outcomes] == [True] + [False] * 6


async def test_replay_raises_what_the_tenant_raised(pipeline, model, tenants):
    _, resident = tenants
    assert len(await pipeline.replay(sequences(resident[:1]))) == 2
    model.raises = frozenset({resident[0][1].digest})
    with pytest.raises(ComputeFailed, match="out of luck"):
        await pipeline.replay(sequences(resident[:1]))


async def test_the_end_of_a_batch_is_foreseen(pipeline, tenants):
    _, resident = tenants
    assert (pipeline.busy_until_s, pipeline.tokens_per_s(100)) == (None, None)
    await run(pipeline, sequences(resident))
    now_s = MonotonicClock().now_s()
    done = run(pipeline, sequences(resident))
    task = asyncio.create_task(done)
    await asyncio.sleep(0)
    assert pipeline.busy_until_s > now_s
    await task
    assert pipeline.busy_until_s is None
    assert replace(pipeline._metrics).batches == 2


async def test_replays_share_a_batch_and_fail_alone(pipeline, model, tenants):
    """The first has a batch of its own; those that come meanwhile share one, where each still has its own outcome."""
    _, resident = tenants
    model.raises = {resident[1][1].digest}
    replays = [pipeline.replay(sequences(resident[i : i + 1])) for i in (0, 1, 2, 2)]
    first, failed, third, again = await asyncio.gather(*replays, return_exceptions=True)
    assert pipeline._metrics.batches == 2
    assert isinstance(failed, ComputeFailed)
    for got, i in ((first, 0), (third, 2), (again, 2)):
        model.raises = frozenset()
        for answer, want in zip(got, await run(pipeline, sequences(resident[i : i + 1])), strict=True):
            assert torch.allclose(answer, want, atol=1e-5)


async def test_a_cancelled_replay_leaves_the_others_alone(pipeline, tenants):
    _, resident = tenants
    first, cancelled, third = (asyncio.ensure_future(pipeline.replay(sequences(resident[i : i + 1]))) for i in range(3))
    await asyncio.sleep(0)
    cancelled.cancel()
    assert len(await first) == len(await third) == 2


async def test_who_left_before_the_batch_began_is_not_computed(pipeline, model, tenants):
    _, resident = tenants
    wanted = sequences(resident)
    model.raises = {resident[1][1].digest}  # whose callers left
    done = asyncio.get_running_loop().create_future()
    keep = [True, True, False, False, True, True]
    pipeline.launch(wanted, lambda computed: done.set_result(computed.outcomes), lambda: keep)
    outcomes = await done
    assert [isinstance(outcome, torch.Tensor) for outcome in outcomes] == keep
    model.raises = frozenset()
    for got, want in zip(outcomes, await run(pipeline, wanted), strict=True):
        assert not isinstance(got, torch.Tensor) or torch.allclose(got, want, atol=1e-5)


async def test_a_batch_that_nobody_waits_for_costs_nothing(pipeline, model, tenants):
    _, resident = tenants
    model.raises = {tenant.digest for _, tenant in resident}
    done = asyncio.get_running_loop().create_future()
    pipeline.launch(sequences(resident), done.set_result, lambda: [False] * 6)
    computed = await done
    outcomes, compute_s = computed.outcomes, computed.compute_s
    assert len(outcomes) == 6
    assert compute_s == 0
    assert pipeline.tokens_per_s(100) is None


class Half:
    """Forwards that end when they are told, and did half of the work, since the rest was stored."""

    def __init__(self) -> None:
        self.futures: list[Future[Computed]] = []

    def submit(self, launch):
        self.futures.append(Future())
        return self.futures[-1]

    def end(self, tokens: int, compute_s: float) -> None:
        self.futures.pop(0).set_result(Computed([], [], tokens, compute_s, 1, False, work=0.5))


async def test_what_was_foretold_wrongly_does_not_add_up():
    """Two in flight for ever, each of which takes half of what a whole one would: the lane is seen to be busy for two
    of the halves and no longer, however many have been."""
    clock, forwards = ManualClock(), Half()
    pipeline = Pipeline(
        forwards, MemoryPressure(4096, clock), clock, Metrics(), Throughput(lambda tokens: tokens / 100)
    )
    texts = [SequenceInput([5] * 100, [0] * 100)]
    pipeline.launch(texts, lambda computed: None)
    for _ in range(60):
        pipeline.launch(texts, lambda computed: None)
        clock.now += 0.5
        forwards.end(100, 0.5)
        await asyncio.sleep(0.001)
    assert pipeline.in_flight == 1
    assert pipeline.busy_until_s - clock.now == pytest.approx(0.5, abs=0.1)
    assert pipeline.tokens_per_s(100) == pytest.approx(200, rel=0.1)
    assert pipeline.batch_s(100) == pytest.approx(0.5, abs=0.05)
    forwards.end(100, 0.5)
    await asyncio.sleep(0.001)
    assert pipeline.busy_until_s is None


async def test_a_launch_in_parts_comes_back_whole(pipeline, backbone, factory, tmp_path):
    """Tenants with weights of their own among others, in any order; and one of them fails alone."""
    modules = [factory.tenant(kind) for kind in ("whole", "lora", "whole", "none")]
    arena, resident = Arena(backbone.config, backbone.fingerprint, torch.float32, 2**24), []
    for module in modules:
        data = write_tenant(module)
        path = tmp_path / str(len(resident))
        path.write_bytes(data)
        resident.append(arena.fill(arena.reserve(parse_header(data), hashlib.sha256(data).hexdigest()), path))
    order = [3, 0, 2, 1, 0, 3, 2, 1]
    work = [SequenceInput([5, 6, 7 + n], [0] * 3, resident[i]) for n, i in enumerate(order)]
    expected = [dense_forward(backbone, modules[i], [5, 6, 7 + n], [0] * 3) for n, i in enumerate(order)]
    done = await run(pipeline, work)
    for got, want in zip(done, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    pipeline._forwards._model.raises = frozenset({resident[2].digest})
    done = await run(pipeline, work)
    for i, got, want in zip(order, done, expected, strict=True):
        assert isinstance(got, ComputeFailed) == (i == 2)
        if i != 2:
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
