"""Streams, events and pinned memory of a real GPU keep the order that the CPU twin and the fake device promise."""

from __future__ import annotations

import pytest
import torch

from runtime.clock import MonotonicClock
from runtime.staging import Staging
from runtime.streams import open_device
from runtime.uploads import Uploads

pytestmark = pytest.mark.cuda


@pytest.fixture
def device():
    pytest.importorskip("cupy", reason="cupy is not installed")
    device = open_device(torch.device("cuda"), MonotonicClock())
    yield device
    device.close()


def numbers(device, count, first=0):
    """float32 count numbers in pinned memory."""
    host = device.pinned(4 * count).view(torch.float32)
    host.copy_(torch.arange(first, first + count, dtype=torch.float32))
    return host


def test_pinned_memory_is_pinned_and_exact(device):
    host = device.pinned(3 * 2**20 + 4)
    assert host.nbytes == 3 * 2**20 + 4
    assert host.is_pinned()


def test_a_copy_comes_after_what_its_stream_waited_for(device):
    """Long work on the compute stream writes what another stream then reads, many times over."""
    count, stream = 2**20, device.stream("rows")
    source, back = numbers(device, count), device.pinned(4 * count).view(torch.float32)
    dev = device.empty(4 * count).view(torch.float32)
    for turn in range(20):
        with device.compute.current():
            torch.cuda._sleep(2_000_000)
            dev.fill_(turn)
        stream.wait(device.compute.record())
        stream.copy(back, dev)
        copied = stream.record()
        device.compute.wait(copied)
        device.compute.copy(dev, source)
        copied.synchronize()
        assert bool((back == turn).all())
    device.compute.synchronize()
    assert torch.equal(dev.cpu(), source)


def test_copies_return_before_they_are_done(device):
    stream, source = device.stream("rows"), numbers(device, 2**20)
    with device.compute.current():
        torch.cuda._sleep(200_000_000)  # about 0.1 s
    slept = device.compute.record()
    stream.wait(slept)
    begin = stream.record()
    stream.copy(device.empty(source.nbytes).view(torch.float32), source)
    end = stream.record()
    assert not end.done()
    end.synchronize()
    assert end.done()
    assert 0 < end.since_s(begin) < 0.1


def test_layers_of_an_upload_arrive_in_order(device):
    sources = [numbers(device, 2**18, first=i) for i in range(6)]
    dev = device.empty(6 * sources[0].nbytes).view(torch.float32).view(6, -1)
    arrival = Uploads(device).start([(i, dev[i], source) for i, source in enumerate(sources)])
    sums = []
    for i in range(6):
        arrival.wait(i, device.compute)
        with device.compute.current():
            sums.append(dev[i].double().sum())
    device.compute.synchronize()
    assert [float(s) for s in sums] == [float(source.double().sum()) for source in sources]
    assert arrival.done()


class _Counting:
    """A row source whose rows hold the number of the batch."""

    width, dtype, turn = 512, torch.bfloat16, 0

    def gather(self, rows, out):
        self.turn += 1
        out.fill_(self.turn)


class _Rows:
    token_ids = torch.zeros(4096, dtype=torch.int64)


def test_a_staging_buffer_is_not_overwritten_while_it_is_read(device):
    stream, staging, source = device.stream("rows"), Staging(device), _Counting()
    seen = []
    for _ in range(30):
        staging.fill(source, _Rows, stream)
        rows = staging.rows(device.compute)
        with device.compute.current():
            torch.cuda._sleep(1_000_000)
            seen.append((rows.float().min(), rows.float().max()))
        staging.leave(device.compute)
    device.compute.synchronize()
    assert [(float(low), float(high)) for low, high in seen] == [(float(i), float(i)) for i in range(1, 31)]
