"""Lane 2: tenant modules on their way to the device, layer by layer: one computes while the next arrives."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter, itemgetter

import torch
from torch import Tensor

from runtime.streams import Device, Event, Stream
from runtime.trace import Trace
from vbert.arena import Arena, Reservation, ResidentTenant
from vbert.memory import Slabs
from vbert.model import Model

__all__ = ["Arrival", "Piece", "Uploads", "all_moved_at_once", "module_pieces", "moved_at_once"]

_SPARE_BYTES = 1 << 26  # of an arena, for slots that do not fill their slabs

Piece = tuple[int, Tensor, Tensor]  # layer (-1: embeddings, L: heads), destination, source of the same shape and dtype


def module_pieces(source: ResidentTenant, target: Reservation) -> list[Piece]:
    """What it takes to copy the slots of a module into those reserved for it in another arena, one piece a layer."""
    pieces: list[Piece] = []
    slots = zip(target.slots, source.slots, source.header.layouts.values(), strict=True)
    for (into, i), (out_of, j), layout in slots:
        for layer, group in groupby(layout.entries, key=attrgetter("layer")):
            entries = list(group)
            part = slice(entries[0].offset, entries[-1].offset + entries[-1].numel)
            pieces.append((layer, into.values[i, part], out_of.values[j, part]))
            if into.columns is not None and out_of.columns is not None:
                pieces.append((layer, into.columns[i, part], out_of.columns[j, part]))
        if into.row_starts is not None and out_of.row_starts is not None:
            pieces.append((layout.entries[0].layer, into.row_starts[i], out_of.row_starts[j]))
    return sorted(pieces, key=itemgetter(0))


def moved_at_once(source: ResidentTenant, arena: Arena) -> ResidentTenant:
    """The tenant in another arena, copied before this returns: for measurements and tests, which have no lanes."""
    reservation = arena.reserve(source.header, source.digest)
    assert reservation is not None, "the arena has room"
    for _, into, out_of in module_pieces(source, reservation):
        into.copy_(out_of)
    return source.moved(reservation, arena.device)


def all_moved_at_once(sources: Sequence[ResidentTenant], model: Model) -> list[ResidentTenant]:
    """The tenants in an arena of their own where the model computes; on a CPU as they are."""
    if model.device.type == "cpu":
        return list(sources)
    room = 2 * sum(source.num_bytes for source in sources) + _SPARE_BYTES
    memory = Slabs(torch.empty(room, dtype=torch.uint8, device=model.device))
    arena = Arena(model.config, model.fingerprint, model.dtype, room, memory=memory)
    return [moved_at_once(source, arena) for source in sources]


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """One upload. layers: those that it brings, ascending; events[i]: layers[i] and all before it have arrived."""

    layers: tuple[int, ...]
    events: tuple[Event, ...]

    def wait(self, layer: int, stream: Stream) -> None:
        """What is issued to `stream` from now on begins after the pieces of all layers up to this one have arrived."""
        if count := bisect_right(self.layers, layer):
            stream.wait(self.events[count - 1])

    def done(self) -> bool:
        """Whether everything has arrived. Raises what went wrong on the way."""
        return not self.events or self.events[-1].done()

    def synchronize(self) -> None:
        """Block until everything has arrived, as before sources or slots change hands. Raises what went wrong."""
        if self.events:
            self.events[-1].synchronize()


class Uploads:
    """The module lane. Any thread may start an upload; they arrive in the order they were started.

    The caller sees to it that no batch uses the destinations, and that neither side changes hands before the arrival.
    """

    def __init__(self, device: Device, *, overlapped: bool = True, trace: Trace | None = None) -> None:
        """overlapped: whether uploads run beside the caller; else `start` returns when everything has arrived."""
        self._stream, self._overlapped, self._trace = device.stream("modules"), overlapped, trace

    def start(self, pieces: Iterable[Piece], name: str = "") -> Arrival:
        """Copy the pieces, which are in the order of their layers. name: for the trace.

        Raises ShapeError, or what the device says; then nothing is on its way any more.
        """
        begin, num_bytes = self._stream.record(), 0
        layers: list[int] = []
        events: list[Event] = []
        try:
            for layer, group in groupby(pieces, key=itemgetter(0)):
                assert not layers or layer > layers[-1], f"layer {layer} comes after layer {layers[-1]}"
                for _, dst, src in group:
                    self._stream.copy(dst, src)
                    num_bytes += src.nbytes
                layers.append(layer)
                events.append(self._stream.record())
        except BaseException:
            self._stream.synchronize()  # the caller gives the slots to others now
            raise
        arrival = Arrival(tuple(layers), tuple(events))
        if self._trace is not None and events:
            self._trace.span("modules", begin, events[-1], f"module {name}", bytes=num_bytes, layers=len(layers))
        if not self._overlapped:
            arrival.synchronize()
        return arrival
