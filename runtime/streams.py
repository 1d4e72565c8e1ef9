"""Streams, events and pinned memory of a device, with the same interface where there is none.

What is given to one stream runs in that order; streams run side by side; an event marks a place in a stream, and
another stream or a thread may wait for it. A CUDA device keeps that order itself. On a CPU every stream but the compute
stream is a worker thread, and the compute stream is the thread that issues the work: it computes at once and waits by
blocking.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from runtime.clock import Clock
from vbert.errors import KernelUnavailable, ShapeError

__all__ = ["CpuDevice", "CudaDevice", "Device", "Event", "Stream", "open_device"]

T = TypeVar("T")


class Event(Protocol):
    """A place in a stream: reached when everything that was issued there before has ended."""

    def done(self) -> bool:
        """Whether it is reached. Raises what went wrong before it."""
        ...

    def synchronize(self) -> None:
        """Block the calling thread until it is reached. Raises what went wrong before it."""
        ...

    def since_s(self, earlier: Event) -> float:
        """Seconds from another event of this device to this one; both are reached."""
        ...


class Stream(Protocol):
    """Calls return before the work is done, but on the compute stream of a CPU. Any thread may call."""

    def copy(self, dst: Tensor, src: Tensor) -> None:
        """dst[...] = src, of one shape and dtype; host memory is pinned. Both stay alive until it has ended."""
        ...

    def record(self) -> Event: ...

    def wait(self, event: Event) -> None:
        """What is issued from now on begins after the event."""
        ...

    def uses(self, tensor: Tensor) -> None:
        """Work issued here uses a tensor made elsewhere: its memory is not given to others before that has ended."""
        ...

    def current(self) -> AbstractContextManager[Any]:
        """Inside the block, torch operators of this thread are issued here."""
        ...

    def synchronize(self) -> None:
        """Block the calling thread until all that was issued has ended."""
        ...


class Device(Protocol):
    @property
    def compute(self) -> Stream:
        """Where forwards run."""
        ...

    @property
    def runs_ahead(self) -> bool:
        """Whether work issued to the compute stream runs while the thread that issued it goes on."""
        ...

    def stream(self, name: str) -> Stream:
        """A new stream that runs beside the others."""
        ...

    def pinned(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 in host memory that the device reads by itself; exactly so many bytes are taken."""
        ...

    def empty(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 in device memory, with anything in it."""
        ...

    def close(self) -> None:
        """Finish what was issued. Nothing may be issued afterwards."""
        ...


def open_device(device: torch.device, clock: Clock) -> Device:
    """After the model was loaded there. Raises KernelUnavailable for a CUDA device without cupy."""
    return CudaDevice(device) if device.type == "cuda" else CpuDevice(clock)


def _check_copy(dst: Tensor, src: Tensor) -> None:
    if dst.shape != src.shape or dst.dtype != src.dtype:
        raise ShapeError(
            f"a copy of {list(src.shape)} {src.dtype} does not fit {list(dst.shape)} {dst.dtype}; make both the same"
        )


# ---- without a device --------------------------------------------------------------------------------------------


class _Mark:
    """`reached`: gets the time when the stream came here, or what went wrong before."""

    def __init__(self, reached: Future[float]) -> None:
        self._reached = reached

    def done(self) -> bool:
        return self._reached.done() and self._reached.result() is not None

    def synchronize(self) -> None:
        self._reached.result()

    def since_s(self, earlier: Event) -> float:
        assert isinstance(earlier, _Mark)
        return self._reached.result() - earlier._reached.result()


class _Worker:
    """A stream that is a thread. After an error nothing more is done, and every later event raises it, as on CUDA."""

    def __init__(self, name: str, clock: Clock) -> None:
        self._clock = clock
        self._error: Exception | None = None
        # one thread for torch, too: a second OpenMP pool would slow the one of the compute thread down
        self._thread = ThreadPoolExecutor(1, f"vbert-{name}", initializer=torch.set_num_threads, initargs=(1,))

    def copy(self, dst: Tensor, src: Tensor) -> None:
        _check_copy(dst, src)
        self._thread.submit(self._do, lambda: _copy(dst, src))

    def record(self) -> Event:
        return _Mark(self._thread.submit(self._do, self._clock.now_s))

    def wait(self, event: Event) -> None:
        self._thread.submit(self._do, event.synchronize)

    def uses(self, tensor: Tensor) -> None:
        """Memory is freed by count, and the work that waits here counts."""

    def current(self) -> AbstractContextManager[Any]:
        raise KernelUnavailable("a stream of the CPU only copies; issue operators to the compute stream")

    def synchronize(self) -> None:
        self.record().synchronize()

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _do(self, work: Callable[[], T]) -> T:
        if self._error is None:
            try:
                return work()
            except Exception as error:
                self._error = error
        raise self._error


class _Inline:
    """The stream that is whichever thread issues the work."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def copy(self, dst: Tensor, src: Tensor) -> None:
        _check_copy(dst, src)
        _copy(dst, src)

    def record(self) -> Event:
        reached: Future[float] = Future()
        reached.set_result(self._clock.now_s())
        return _Mark(reached)

    def wait(self, event: Event) -> None:
        event.synchronize()

    def uses(self, tensor: Tensor) -> None:
        """What was issued has ended already."""

    def current(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def synchronize(self) -> None:
        """What was issued has ended already."""


@torch.inference_mode()
def _copy(dst: Tensor, src: Tensor) -> None:
    dst.copy_(src)


class CpuDevice:
    """No device at all: the same order of work, kept by threads. Host and device memory are the same."""

    runs_ahead = False

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.compute: Stream = _Inline(clock)
        self._workers: list[_Worker] = []

    def stream(self, name: str) -> Stream:
        self._workers.append(_Worker(name, self._clock))
        return self._workers[-1]

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def empty(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


# ---- CUDA --------------------------------------------------------------------------------------------------------


_cuda: Any = torch.cuda  # its classes are not typed


class _CudaEvent:
    def __init__(self, event: Any) -> None:
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())

    def synchronize(self) -> None:
        self.event.synchronize()

    def since_s(self, earlier: Event) -> float:
        assert isinstance(earlier, _CudaEvent)
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class _CudaStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def copy(self, dst: Tensor, src: Tensor) -> None:
        _check_copy(dst, src)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            dst.copy_(src, non_blocking=True)
        for tensor in (dst, src):
            self.uses(tensor)

    def record(self) -> Event:
        # blocking: a thread that waits sleeps and does not spin on a core that others need
        event = _cuda.Event(enable_timing=True, blocking=True)
        event.record(self._stream)
        return _CudaEvent(event)

    def wait(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        self._stream.wait_event(event.event)

    def uses(self, tensor: Tensor) -> None:
        if tensor.is_cuda:
            tensor.record_stream(self._stream)

    def current(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()


class CudaDevice:
    """One GPU. Pinned memory comes from cupy, because torch rounds blocks up to powers of two."""

    runs_ahead = True

    def __init__(self, device: torch.device) -> None:
        try:
            import cupy
        except ImportError as error:
            raise KernelUnavailable(
                f"device {device} needs cupy ({error}); install the extra cuda12 or cuda13, or use device='cpu'"
            ) from error
        self._cupy: Any = cupy
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        # the weights came on the stream of the thread that loaded them, and no event says so to the streams made here
        torch.cuda.synchronize(self._device)
        self.compute: Stream = self.stream("compute")

    def stream(self, name: str) -> Stream:
        return _CudaStream(_cuda.Stream(self._device))

    def pinned(self, num_bytes: int) -> Tensor:
        with torch.cuda.device(self._device):
            memory = self._cupy.cuda.PinnedMemory(num_bytes)  # the pool behind alloc_pinned_memory would round up, too
        return torch.frombuffer(self._cupy.cuda.PinnedMemoryPointer(memory, 0), dtype=torch.uint8, count=num_bytes)

    def empty(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
