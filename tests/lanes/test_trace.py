"""The trace is a whole JSON array after every write, holds one row a lane, and never fails a batch."""

from __future__ import annotations

import json
import os

import pytest

from runtime.clock import MonotonicClock
from runtime.streams import CpuDevice
from runtime.trace import LANES, Trace
from tests.fakes import ManualClock
from tests.lanes.test_streams import Gate
from vbert.errors import ConfigError


@pytest.fixture
def clock():
    return ManualClock(5.0)


@pytest.fixture
def device(clock):
    device = CpuDevice(clock)
    yield device
    device.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.json"


def read(path):
    return json.loads(path.read_text())


def spans(path):
    return [event for event in read(path) if event["ph"] == "X"]


def test_a_new_trace_names_its_rows(path, device):
    trace = Trace(path, device)
    assert [(event["tid"], event["args"]["name"]) for event in read(path)] == list(enumerate(LANES))
    trace.close()


def test_spans_have_the_times_of_their_events(path, device, clock):
    trace = Trace(path, device)
    trace.now().synchronize()
    clock.now = 5.25
    begin = device.compute.record()
    clock.now = 5.75
    trace.span("compute", begin, device.compute.record(), "batch 1", tokens=7, tenants=2)
    trace.flush()
    (span,) = spans(path)
    assert (span["name"], span["tid"], span["args"]) == ("batch 1", LANES.index("compute"), {"tokens": 7, "tenants": 2})
    assert (span["ts"], span["dur"]) == (250_000.0, 500_000.0)
    trace.close()


def test_spans_wait_until_they_are_over(path, device):
    trace, stream, gate = Trace(path, device), device.stream("rows"), Gate()
    stream.wait(gate)
    trace.span("rows", device.compute.record(), stream.record(), "later")
    trace.span("compute", device.compute.record(), device.compute.record(), "now")
    trace.flush()
    assert [span["name"] for span in spans(path)] == ["now"]
    gate.open()
    stream.synchronize()
    trace.close()
    assert [span["name"] for span in spans(path)] == ["now", "later"]


def test_a_full_trace_is_whole(path, caplog):
    device = CpuDevice(MonotonicClock())
    trace = Trace(path, device, max_spans=len(LANES) + 3)
    for i in range(9):
        trace.span("compute", trace.now(), device.compute.record(), f"batch {i}")
        device.compute.wait(trace.now())
        trace.flush()
    trace.close()
    device.close()
    assert [span["name"] for span in spans(path)] == ["batch 0", "batch 1", "batch 2"]
    assert "as many spans" in caplog.text


def test_a_span_that_failed_is_left_out(path, device, caplog):
    class Broken:
        def synchronize(self):
            raise RuntimeError("gone")

    trace, stream = Trace(path, device), device.stream("modules")
    stream.wait(Broken())
    trace.span("modules", device.compute.record(), stream.record(), "lost")
    with pytest.raises(RuntimeError, match="gone"):
        stream.synchronize()
    trace.close()
    assert not spans(path)
    assert "gone" in caplog.text


def test_a_disk_that_is_full_ends_the_trace_only(path, device, caplog, monkeypatch):
    trace = Trace(path, device)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        trace.span("compute", device.compute.record(), device.compute.record(), "batch")
        trace.flush()
    trace.close()
    assert not spans(path)
    assert "No space left" in caplog.text


def test_a_path_that_cannot_be_written_is_refused(tmp_path, device):
    with pytest.raises(ConfigError, match="choose another"):
        Trace(tmp_path / "absent" / "trace.json", device)


def test_memory_is_bounded(path, device):
    trace, stream, gate = Trace(path, device), device.stream("modules"), Gate()
    stream.wait(gate)
    never = stream.record()
    for i in range(5000):
        trace.span("modules", never, never, f"module {i}")
    assert len(trace._waiting) < 5000
    gate.open()
    stream.synchronize()
    trace.close()
