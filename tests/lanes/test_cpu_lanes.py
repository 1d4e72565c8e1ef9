"""The lanes on the CPU twin: real threads, and the answers of the plain forward in every setting."""

from __future__ import annotations

import threading
from itertools import chain, combinations

import pytest
import torch

from runtime.clock import MonotonicClock
from runtime.errors import ComputeFailed
from runtime.launch import Launch
from runtime.streams import CpuDevice
from runtime.uploads import Uploads
from tests.lanes.test_streams import Gate
from tests.lanes.world import LANES, Server

SETTINGS = list(chain.from_iterable(combinations(LANES, n) for n in range(4)))
BATCHES = [(0, 1), (2,), (None, 3), (0, 4), (1, 2), (None,)]
LENGTHS = (5, 9)


@pytest.mark.parametrize("lanes", SETTINGS, ids=lambda lanes: "+".join(lanes) or "none")
@pytest.mark.parametrize("mapped", [False, True])
def test_any_setting_gives_the_answers_of_the_plain_forward(modules, words, lanes, mapped):
    with Server(modules, CpuDevice(MonotonicClock()), lanes=lanes, words=words if mapped else None) as server:
        outcomes = server.run(BATCHES, lengths=LENGTHS)
    for k, (tenants, got) in enumerate(zip(BATCHES, outcomes, strict=True)):
        for outcome, want in zip(got, modules.answers(tenants, LENGTHS[k % 2]), strict=True):
            torch.testing.assert_close(outcome, want, atol=1e-5, rtol=0)


def test_with_all_lanes_off_the_answers_are_the_same_bits(modules):
    with Server(modules, CpuDevice(MonotonicClock()), lanes=()) as server:
        (outcomes,) = server.run([(0, 1, 2)])
    assert all(torch.equal(got, want) for got, want in zip(outcomes, modules.answers((0, 1, 2)), strict=True))


@pytest.fixture
def server(modules, words):
    with Server(modules, CpuDevice(MonotonicClock()), words=words) as server:
        yield server


def computed(server, launch):
    return server.forwards.submit(launch).result(20)


def test_the_next_batch_is_prepared_while_one_computes(modules, words, server):
    """The compute thread is kept busy; the rows of two batches are gathered meanwhile, and those of a third wait."""
    release, sequences = threading.Event(), modules.sequences((None,))
    busy = server.forwards._compute.submit(release.wait)
    futures = [server.forwards.submit(Launch(k, sequences)) for k in range(3)]
    while server.source.calls < 2:
        pass
    assert server.forwards.ring.num_free == 0
    release.set()
    assert all(len(future.result(20).outcomes) == 2 for future in futures)
    assert busy.result()
    assert server.forwards.ring.num_free == server.forwards.ring.size


def test_a_layer_computes_before_the_next_has_arrived():
    class Slow(CpuDevice):
        """A device whose module stream stops before what goes to `held`."""

        def stream(self, name):
            stream = super().stream(name)
            copy = stream.copy
            stream.copy = lambda dst, src: (stream.wait(gate) if dst is held else None, copy(dst, src))
            return stream

    device, gate, dst = Slow(MonotonicClock()), Gate(), torch.zeros(2, 4)
    held = dst[1]
    arrival = Uploads(device).start([(0, dst[0], torch.ones(4)), (1, held, torch.ones(4))])
    arrival.wait(-1, device.compute)
    arrival.wait(0, device.compute)
    assert dst[0].sum() == 4
    assert not arrival.done()
    gate.open()
    arrival.wait(5, device.compute)
    assert dst[1].sum() == 4
    assert arrival.done()
    device.close()


def test_uploads_without_overlap_have_arrived_when_they_were_started(server):
    dst = torch.zeros(4)
    assert Uploads(server.device, overlapped=False).start([(0, dst, torch.ones(4))]).done()
    assert dst.sum() == 4


def test_an_upload_of_nothing_has_arrived(server):
    arrival = Uploads(server.device).start([])
    arrival.wait(0, server.device.compute)
    arrival.synchronize()
    assert arrival.done()


def test_an_upload_that_failed_fails_its_tenant_only(modules, server):
    server.run([(0, 1)])

    class Lost:
        def done(self):
            raise OSError("the bus is gone")

    server._arrivals[server.resident[0].digest] = Lost()
    got = computed(server, Launch(9, modules.sequences((0, 1), resident=server.resident)))
    assert [isinstance(outcome, ComputeFailed) for outcome in got.outcomes] == [True, True, False, False]
    assert got.reran


def test_what_is_done_ahead_is_known(modules, server):
    """The policy launches a batch that much before the one before it ends."""
    assert computed(server, Launch(1, modules.sequences((None,)))).ahead_s > 0
    with Server(modules, CpuDevice(MonotonicClock()), lanes=("compute",)) as inline:
        assert computed(inline, Launch(1, modules.sequences((None,)))).ahead_s == 0


def test_callers_that_leave_after_the_rows_were_gathered_are_not_computed(modules, server):
    asked = iter([[True] * 4, [True, True, False, False]])
    server.run([(0, 1)])
    sequences = modules.sequences((0, 1), resident=server.resident)
    got = computed(server, Launch(9, sequences, lambda: next(asked)))
    assert got.num_tokens == sum(len(s.token_ids) for s in sequences[:2])
    assert [isinstance(outcome, ComputeFailed) for outcome in got.outcomes] == [False, False, True, True]
    torch.testing.assert_close(got.outcomes[1], modules.answers((0, 1))[1], atol=1e-5, rtol=0)
    assert server.forwards.ring.num_free == server.forwards.ring.size


def test_callers_that_all_leave_cost_nothing_and_leak_nothing(modules, server):
    for asked in ([[True] * 2, [False] * 2], [[False] * 2, [False] * 2]):
        answers = iter(asked)
        got = computed(server, Launch(9, modules.sequences((None,)), lambda answers=answers: next(answers)))
        assert (got.num_tokens, got.compute_s) == (0, 0.0)
    assert server.forwards.ring.num_free == server.forwards.ring.size


def test_a_bug_of_ours_is_told_and_stops_no_lane(modules, server):
    lost = server.forwards.submit(Launch(1, modules.sequences((None,)), lambda: 1 // 0))
    with pytest.raises(ZeroDivisionError):
        lost.result(20)
    assert len(computed(server, Launch(2, modules.sequences((None,)))).outcomes) == 2
