"""Lane 1: a batch is packed, its rows are gathered in pinned memory and sent to the device, beside the one before it.

A staging buffer is a piece of pinned memory and one of device memory. Who holds one gives it back whatever happens, and
a thread that takes one never waits for a thread that waits for it: the rows thread has a ring, the compute thread
a buffer of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch
from torch import Tensor

from runtime.lower_stores import LowerStores, Routes
from runtime.streams import Device, Event, Stream
from vbert.batch import PackedRows
from vbert.model import Model, PackedBatch, SequenceInput
from vbert.rows import RowSource

__all__ = ["Prepared", "Preparer", "Ring", "Staging"]


class Staging:
    """Room for the rows of one batch; it grows to the largest one seen."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._host = self._dev = torch.empty(0, dtype=torch.uint8)
        self._rows = self._dev  # [T, width], the part that holds the present batch
        self._copied: Event | None = None
        self._consumed: Event | None = None

    @property
    def num_bytes(self) -> int:
        """Pinned and on the device."""
        return self._host.nbytes + self._dev.nbytes

    def fill(self, source: RowSource, rows: PackedRows, stream: Stream) -> None:
        """Gather the rows of a batch and send them on `stream`. Raises what the source raises."""
        num_rows, num_bytes = len(rows.token_ids), len(rows.token_ids) * source.width * source.dtype.itemsize
        if self._copied is not None:
            self._copied.synchronize()  # the copy before still reads the pinned memory
        if num_bytes > len(self._host):
            room = num_bytes + num_bytes // 4  # batches that grow little by little do not allocate each time
            self._host, self._dev = self._device.pinned(room), self._device.empty(room)
        host, self._rows = (
            memory[:num_bytes].view(source.dtype).view(num_rows, source.width) for memory in (self._host, self._dev)
        )
        source.gather(rows, host)
        if self._consumed is not None:
            stream.wait(self._consumed)  # the forward before still reads the device memory
        stream.copy(self._rows, host)
        self._copied = stream.record()

    def rows(self, stream: Stream) -> Tensor:
        """[T, width] on the device; what is issued to `stream` from now on begins after they have arrived."""
        assert self._copied is not None
        stream.wait(self._copied)
        stream.uses(self._rows)
        return self._rows

    def leave(self, stream: Stream) -> None:
        """What was issued to `stream` is the last that reads these rows."""
        self._consumed = stream.record()


class Ring:
    """Staging buffers that go from hand to hand."""

    def __init__(self, device: Device, size: int) -> None:
        self._free: SimpleQueue[Staging] = SimpleQueue()
        self._all = [Staging(device) for _ in range(size)]
        self.size = size
        for staging in self._all:
            self._free.put(staging)

    @property
    def num_bytes(self) -> int:
        return sum(staging.num_bytes for staging in self._all)

    @property
    def num_free(self) -> int:
        return self._free.qsize()

    def take(self) -> Staging:
        """Blocks until one is free."""
        return self._free.get()

    def give_back(self, staging: Staging) -> None:
        self._free.put(staging)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A packed batch whose rows are on their way. begin, end: of its preparation, on the stream that did it. given:
    states of stored sequences, stored_rows: what stored n-grams say; both on the device. routes: what the stores said.
    """

    batch: PackedBatch
    begin: Event
    end: Event
    ring: Ring
    staging: Staging | None
    given: Tensor | None = None
    stored_rows: Tensor | None = None
    routes: Routes = field(default_factory=Routes)

    def word_rows(self, stream: Stream) -> Tensor | None:
        return None if self.staging is None else self.staging.rows(stream)

    def given_rows(self, stream: Stream) -> Tensor:
        """[n, H] states of stored sequences; what is issued to `stream` from now on begins after they have arrived."""
        assert self.given is not None
        return self._arrived(self.given, stream)

    def entry_rows(self, stream: Stream) -> Tensor | None:
        """[T, H] float32, as `given_rows`."""
        return None if self.stored_rows is None else self._arrived(self.stored_rows, stream)

    def _arrived(self, rows: Tensor, stream: Stream) -> Tensor:
        stream.wait(self.end)
        stream.uses(rows)
        return rows

    @contextmanager
    def read_by(self, stream: Stream) -> Iterator[None]:
        """Inside the block the batch is issued to `stream`; then its buffer is free for the next one."""
        try:
            yield
        finally:
            self.drop(stream)

    def drop(self, stream: Stream) -> None:
        """Give the buffer back; `stream` is the only one that may still read it."""
        if self.staging is not None:
            self.staging.leave(stream)
            self.ring.give_back(self.staging)


class Preparer:
    """Packs and gathers on the thread that calls it, and sends on one stream. source None: forwards look up."""

    def __init__(
        self,
        model: Model,
        source: RowSource | None,
        ring: Ring,
        device: Device,
        stream: Stream,
        stores: LowerStores,
    ) -> None:
        self._model, self._source, self._ring = model, source, ring
        self._device, self._stream, self._stores = device, stream, stores

    def __call__(self, sequences: Sequence[SequenceInput]) -> Prepared:
        """Raises what packing or the source raises, with no buffer taken."""
        begin = self._stream.record()
        routes = self._stores.routes(sequences, pin=self._device.runs_ahead)
        if routes.changes_nothing:
            batch = self._model.pack(sequences)
        else:
            batch = self._model.pack_joined(sequences, self._stores.ways(routes, len(sequences)))
        given = None if routes.found is None else self._sent(routes.found.rows)
        stored = None if routes.skipped is None else self._sent(routes.skipped.entry.rows)
        entering = batch.entering
        looks_up = self._source is not None and entering is not None and batch.whole is None
        staging = self._filled(entering.rows) if looks_up and entering is not None else None
        return Prepared(batch, begin, self._stream.record(), self._ring, staging, given, stored, routes)

    def _sent(self, rows: Tensor | None) -> Tensor | None:
        """Rows in pinned memory, which the routes keep alive, to a device that is not the host."""
        if rows is None or not self._device.runs_ahead:
            return rows
        with self._stream.current():
            there = torch.empty(rows.shape, dtype=rows.dtype, device=self._model.device)
        self._stream.copy(there, rows)
        return there

    def _filled(self, rows: PackedRows) -> Staging:
        assert self._source is not None
        staging = self._ring.take()
        try:
            staging.fill(self._source, rows, self._stream)
        except BaseException:
            self._ring.give_back(staging)
            raise
        return staging
