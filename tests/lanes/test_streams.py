"""The CPU twin keeps the order that CUDA streams and events keep."""

from __future__ import annotations

import threading

import pytest
import torch

from runtime.clock import MonotonicClock
from runtime.streams import CpuDevice
from tests.fakes import ManualClock
from vbert.errors import ShapeError


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def device(clock):
    device = CpuDevice(clock)
    yield device
    device.close()


class Gate:
    """An event that is reached when the test says so."""

    def __init__(self):
        self._open = threading.Event()
        self.open = self._open.set

    def done(self):
        return self._open.is_set()

    def synchronize(self):
        assert self._open.wait(20)


def ones(n=4):
    return torch.ones(n), torch.zeros(n)


def test_work_of_a_stream_runs_in_order(device):
    stream, gate = device.stream("a"), Gate()
    src, dst = ones()
    stream.wait(gate)
    stream.copy(dst, src)
    copied = stream.record()
    stream.copy(dst, src * 2)
    assert not copied.done()
    assert dst.sum() == 0
    gate.open()
    stream.synchronize()
    assert copied.done()
    assert dst.tolist() == [2.0] * 4


def test_streams_run_side_by_side_and_meet_at_events(device):
    first, second, gate = device.stream("a"), device.stream("b"), Gate()
    src, dst = ones()
    out = torch.zeros(4)
    first.wait(gate)
    first.copy(dst, src)
    second.wait(first.record())
    second.copy(out, dst)
    read = second.record()
    third = device.stream("c")
    third.synchronize()  # not held up by the others
    assert not read.done()
    gate.open()
    read.synchronize()
    assert out.tolist() == [1.0] * 4


def test_the_compute_stream_is_the_thread_that_issues(device):
    stream, gate = device.stream("a"), Gate()
    src, dst = ones()
    stream.wait(gate)
    stream.copy(dst, src)
    threading.Timer(0.01, gate.open).start()
    device.compute.wait(stream.record())  # blocks
    assert dst.sum() == 4
    device.compute.copy(dst, src * 3)
    assert dst.sum() == 12
    assert device.compute.record().done()
    with device.compute.current():
        pass


def test_events_know_the_time_between_them(device, clock):
    begin = device.compute.record()
    clock.now = 2.5
    assert device.compute.record().since_s(begin) == 2.5


def test_memory_is_as_large_as_was_asked_for(device):
    assert device.pinned(1000).nbytes == device.empty(1000).nbytes == 1000


def test_a_copy_that_does_not_fit_is_refused_at_once(device):
    for stream in (device.compute, device.stream("a")):
        with pytest.raises(ShapeError, match=r"\[2\].*\[3\]"):
            stream.copy(torch.zeros(3), torch.zeros(2))
        with pytest.raises(ShapeError, match="float16"):
            stream.copy(torch.zeros(3), torch.zeros(3, dtype=torch.float16))


def test_an_error_in_a_stream_shows_at_every_later_event(device):
    class Broken:
        def synchronize(self):
            raise RuntimeError("gone")

    stream = device.stream("a")
    before = stream.record()
    stream.wait(Broken())
    after = stream.record()
    before.synchronize()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="gone"):
            after.synchronize()
    with pytest.raises(RuntimeError, match="gone"):
        after.done()
    with pytest.raises(RuntimeError, match="gone"):
        stream.synchronize()


def test_worker_threads_have_one_thread_for_torch():
    device, counts = CpuDevice(MonotonicClock()), []

    class Asks:
        def synchronize(self):
            counts.append(torch.get_num_threads())

    stream = device.stream("a")
    stream.wait(Asks())
    stream.synchronize()
    device.close()
    assert counts == [1]
