"""A device that keeps as little order as CUDA does, and a race detector for what is done on it.

Work of a stream waits in a queue until somebody waits for an event; then streams take turns at random, so that
every delay happens that events do not forbid. Beside that every thread and stream has a vector clock: an access is
a race unless everything it must come after is known, by events, to have happened before, whatever order this run took.
Source: Pozniansky and Schuster 2003 (DJIT+), with one clock for each stream and each thread.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Access:
    """Who wrote a range of memory last, and who read it since: timelines and their times."""

    write: tuple[str, int] | None = None
    reads: dict[str, int] = field(default_factory=dict)


def span(tensor):
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def join(clock, other):
    for name, time in other.items():
        clock[name] = max(clock.get(name, 0), time)


def site():
    """Where in the product this wait was asked for."""
    frame = sys._getframe(2)
    path = Path(frame.f_code.co_filename)
    return f"{path.relative_to(ROOT)}:{frame.f_lineno}" if path.is_relative_to(ROOT) else ""


class FakeEvent:
    def __init__(self, device, clock):
        self.device, self.clock, self.reached, self.error = device, dict(clock), False, None

    def done(self):
        with self.device.lock:
            self.device.step()
            return self._know() if self.reached else False

    def synchronize(self):
        if self.device.drops(site()):
            return
        with self.device.lock:
            while not self.reached:
                assert self.device.step(), "streams wait for each other"
            self._know()

    def since_s(self, earlier):
        assert self.reached
        assert earlier.reached
        return 1e-3

    def _know(self):
        join(self.device.host(), self.clock)
        return True


class FakeStream:
    def __init__(self, device, name):
        self.device, self.name, self.clock, self.queue = device, name, {}, deque()

    def issue(self, action, *, reads=(), writes=()):
        """Work for later, and what memory it touches."""
        with self.device.lock:
            join(self.clock, self.device.host())
            self.clock[self.name] = self.clock.get(self.name, 0) + 1
            self.device.access(self.name, self.clock, reads, writes)
            self.queue.append(action)

    def copy(self, dst, src):
        assert (dst.shape, dst.dtype) == (src.shape, src.dtype)
        self.device.maybe_fail()
        self.device.keep(dst)
        self.issue(lambda: dst.copy_(src), reads=[src], writes=[dst])

    def record(self):
        with self.device.lock:
            join(self.clock, self.device.host())
            event = FakeEvent(self.device, self.clock)
            self.queue.append(lambda: setattr(event, "reached", True))
            return event

    def wait(self, event):
        if self.device.drops(site()):
            return
        with self.device.lock:
            join(self.clock, event.clock)
            self.queue.append(event)

    record_event, wait_event = record, wait  # as torch names them

    def uses(self, tensor):
        self.device.used.append((self.name, span(tensor)))

    def current(self):
        return nullcontext()

    def synchronize(self):
        event = self.record()
        if not self.device.drops(site()):
            event.synchronize()


class FakeDevice:
    """drop: a place in the product whose waits do nothing. fail: copies, by number, that raise."""

    runs_ahead = True

    def __init__(self, seed=0, *, drop=None, fail=()):
        self.random, self.lock = random.Random(seed), threading.RLock()
        self.races, self.sites, self.used = [], set(), []
        self._drop, self._fail, self._copies = drop, set(fail), 0
        self._streams, self._hosts, self._accesses, self._kept = [], {}, {}, []
        self.compute = self.stream("compute")

    def stream(self, name):
        self._streams.append(FakeStream(self, f"{name}#{len(self._streams)}"))
        return self._streams[-1]

    def pinned(self, num_bytes):
        return self.keep(torch.empty(num_bytes, dtype=torch.uint8))

    empty = pinned

    def close(self):
        with self.lock:
            while self.step():
                pass

    def keep(self, tensor):
        """An address means one buffer for ever."""
        self._kept.append(tensor)
        return tensor

    # ---- what a test tells ---------------------------------------------------------------------------------------

    def touch(self, *, reads=(), writes=()):
        """The calling thread reads or writes memory itself."""
        with self.lock:
            name, clock = self._host_name(), self.host()
            clock[name] = clock.get(name, 0) + 1
            self.access(name, clock, reads, writes)

    def meet(self):
        """The calling thread was told by all others how far they are, as by a future."""
        with self.lock:
            for clock in list(self._hosts.values()):
                join(self.host(), clock)

    # ---- clocks --------------------------------------------------------------------------------------------------

    def host(self):
        return self._hosts.setdefault(self._host_name(), {})

    def _host_name(self):
        return f"thread {threading.get_ident()}"

    def access(self, name, clock, reads, writes):
        for tensor, writing in [(t, False) for t in reads] + [(t, True) for t in writes]:
            first, last = own = span(tensor)
            self._accesses.setdefault(own, Access())
            for (begin, end), seen in self._accesses.items():
                if begin < last and first < end:
                    self._check(name, clock, seen, writing)
            if writing:
                self._accesses[own] = Access(write=(name, clock[name]))
            else:
                self._accesses[own].reads[name] = clock[name]

    def _check(self, name, clock, seen, writing):
        before = [seen.write] if seen.write else []
        before += list(seen.reads.items()) if writing else []
        self.races += [
            f"{name} does not know of {other} at {time}" for other, time in before if clock.get(other, 0) < time
        ]

    # ---- running -------------------------------------------------------------------------------------------------

    def step(self):
        """Run one piece of work of a stream that may go on; whether there was one."""
        while able := [s for s in self._streams if s.queue and self._may_run(s.queue[0])]:
            action = self.random.choice(able).queue.popleft()
            if not isinstance(action, FakeEvent):
                with torch.inference_mode():
                    action()
                return True
        return False

    def _may_run(self, action):
        return not isinstance(action, FakeEvent) or action.reached

    # ---- faults --------------------------------------------------------------------------------------------------

    def drops(self, where):
        if where.startswith(("runtime/", "vbert/")):
            self.sites.add(where)
        return bool(where) and where == self._drop

    def maybe_fail(self):
        with self.lock:
            self._copies += 1
            if self._copies - 1 in self._fail:
                raise RuntimeError("CUDA error: an illegal instruction was encountered")


class Telling(ThreadPoolExecutor):
    """A thread of the runtime: a job knows what its submitter knew, and who takes its result knows what it knew."""

    def __init__(self, device):
        super().__init__(1)
        self._device = device

    def submit(self, function, *args):
        device = self._device
        with device.lock:
            known, learned = dict(device.host()), {}

        def job():
            with device.lock:
                join(device.host(), known)
            try:
                return function(*args)
            finally:
                with device.lock:
                    learned.update(device.host())

        future = super().submit(job)
        result = future.result

        def told(timeout=None):
            try:
                return result(timeout)
            finally:
                with device.lock:
                    join(device.host(), learned)

        future.result = told
        return future
