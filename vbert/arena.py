"""Memory of resident tenant modules: slots of equal shape, one arena class per slot layout.

Loading takes a free slot and never allocates; releasing gives it back and never fragments. What was never used costs
address space only, and the pages of a slot that became free go back to the operating system when another class needs
the memory. The arena moves bytes and keeps owners; which tenant stays is decided elsewhere. `reserve` and `release` are
called from one thread, `fill` from any.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vbert.checkpoint import check_sparse, read_exits, read_head, read_self_tests
from vbert.config import EncoderConfig
from vbert.errors import ShapeError
from vbert.header import TenantHeader
from vbert.layout import SlotLayout
from vbert.memory import AddressSpace, Memory
from vbert.skip import Skip
from vbert.slot_file import Witness, read_into
from vbert.tenant import Exit, Head, SelfTest

__all__ = ["Arena", "ArenaClass", "Reservation", "ResidentTenant"]

_LAYOUTS_KEPT = 4096


class ArenaClass:
    """All slots of one layout. `at[layer, site]`: (variant, part -> [P, *shape] view) of every slot.

    Sparse parts are `row_starts` [P, H_out + 1] (absolute in the slot), `columns` and `values` [P, N].
    """

    def __init__(self, layout: SlotLayout, width: int, dtype: torch.dtype, memory: Memory) -> None:
        self.kind, self.layout, self.width = layout.kind, layout, width
        self.slot_bytes = slot_bytes(layout, dtype)
        num_starts = sum(int(e.variant) + 1 for e in layout.entries) if layout.kind == "sparse" else 0
        indices = [(width, torch.int32), (num_starts, torch.int32)] if num_starts else []
        self._region = memory.region([(width, dtype), *indices])
        self.values = self._region.arrays[0]
        self.columns = self._region.arrays[1] if num_starts else None
        self.row_starts = self._region.arrays[2] if num_starts else None
        self.at = self._views()
        self.owners: dict[int, str] = {}

    @property
    def least_bytes(self) -> int:
        """Of the memory of all classes that this one takes when it has one slot; 0 where memory is each class's own."""
        return self._region.least_bytes

    def is_full(self) -> bool:
        slot = self._region.take()
        if slot is not None:
            self._region.give_back(slot)
        return slot is None

    def take(self, digest: str) -> int | None:
        """A free slot, now owned by `digest`; None when there is no room for one more."""
        slot = self._region.take()
        if slot is not None:
            self.owners[slot] = digest
        return slot

    def give_back(self, slot: int) -> None:
        """The slot is free again. Its pages stay, for the next owner."""
        del self.owners[slot]
        self._region.give_back(slot)

    def return_pages(self, slot: int) -> None:
        self._region.return_pages(slot)

    def crowds(self) -> set[frozenset[str]]:
        """Sets of owners, each of which shares memory that another class could have if all of them left."""
        return {frozenset(self.owners[s] for s in self._region.neighbours(slot)) for slot in self.owners}

    def memory(self, slot: int, layout: SlotLayout) -> dict[str, Tensor]:
        """The memory of a slot, by the names of a native file's tensors. A sparse file may be shorter than the slot."""
        parts = {f"delta.{layout.kind}": self.values[slot, : layout.numel]}
        if self.columns is not None and self.row_starts is not None:
            parts["delta.sparse.columns"] = self.columns[slot, : layout.numel]
            parts["delta.sparse.row_starts"] = self.row_starts[slot]
        return parts

    def settle(self, slot: int, layout: SlotLayout, config: EncoderConfig, *, checked: bool) -> None:
        """Finish a slot that was just read: let row starts of a sparse one count from the slot's start, after they were
        checked, unless they are the same as when they were `checked` before. Raises CorruptFile.
        """
        if self.columns is None or self.row_starts is None:
            return
        starts = self.row_starts[slot]
        if not checked:
            check_sparse(layout, self.columns[slot, : layout.numel], starts, config)
        offsets, counts = zip(*((e.offset, int(e.variant) + 1) for e in layout.entries), strict=True)
        starts += torch.from_numpy(np.repeat(np.array(offsets, np.int32), counts))

    def _views(self) -> dict[tuple[int, str], tuple[str, dict[str, Tensor]]]:
        at: dict[tuple[int, str], tuple[str, dict[str, Tensor]]] = {}
        cursor = 0
        for (layer, site, variant), parts in self.layout.sites().items():
            if self.columns is None or self.row_starts is None:
                views = {
                    part: self.values[:, e.offset : e.offset + e.numel].view(-1, *e.shape) for part, e in parts.items()
                }
            else:
                starts = self.row_starts[:, cursor : cursor + int(variant) + 1]
                cursor += int(variant) + 1
                views = {"row_starts": starts, "columns": self.columns, "values": self.values}
            at[layer, site] = (variant, views)
        return at


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Slots taken for a tenant that is not loaded yet. `num_bytes` counts slots and head."""

    digest: str
    header: TenantHeader
    slots: tuple[tuple[ArenaClass, int], ...]
    num_bytes: int
    bytes_by_kind: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResidentTenant:
    """A tenant version in memory, ready to be named in a batch. `owned` says whether its slots are still its own."""

    reservation: Reservation
    head: Head
    self_tests: tuple[SelfTest, ...] = field(repr=False)
    exits: tuple[Exit, ...] = ()

    @property
    def digest(self) -> str:
        return self.reservation.digest

    @property
    def header(self) -> TenantHeader:
        return self.reservation.header

    @property
    def slots(self) -> tuple[tuple[ArenaClass, int], ...]:
        return self.reservation.slots

    @property
    def num_bytes(self) -> int:
        return self.reservation.num_bytes

    def moved(self, reservation: Reservation, device: torch.device) -> ResidentTenant:
        """The same tenant with its slots on a device, whose numbers come from an upload. The heads go there now."""
        exits = tuple(replace(each, head=_head_on(each.head, device)) for each in self.exits)
        return replace(self, reservation=reservation, head=_head_on(self.head, device), exits=exits)

    def owned(self) -> bool:
        """Whether every slot still belongs to this digest. A batch asks before and after it ran."""
        return all(arena_class.owners.get(slot) == self.digest for arena_class, slot in self.slots)


class Arena:
    """All classes of one device, or of the host."""

    def __init__(
        self,
        config: EncoderConfig,
        fingerprint: str,
        dtype: torch.dtype,
        max_bytes: int,
        *,
        memory: Memory | None = None,
        skip: Skip | None = None,
    ) -> None:
        """max_bytes: more than this is never used, by what is resident and by pages kept for the next owner.
        memory: where the slots lie; default: address space of the CPU. skip: of the backbone."""
        self._config, self._fingerprint, self._skip = config, fingerprint, skip
        self._dtype, self._max_bytes = dtype, max_bytes
        self._memory = memory or AddressSpace(max_bytes)
        self.device = self._memory.device
        self._classes: dict[str, ArenaClass] = {}
        self._idle: dict[tuple[ArenaClass, int], None] = {}  # free slots that still have pages, the longest first
        self._layouts: set[str] = set()  # that fit this backbone
        self._slot_bytes = 0  # of all slots that have an owner or are idle

    def num_bytes(self, header: TenantHeader) -> int:
        """Bytes the tenant will hold while resident: its slots, and its head in float32."""
        return sum(self._bytes_by_kind(header).values())

    def reserve(self, header: TenantHeader, digest: str) -> Reservation | None:
        """Take a slot in each class the tenant uses; None when a class has no free slot. No I/O.

        Raises WrongBackbone, CorruptFile when the header does not fit this backbone.
        """
        header.check(self._config, self._fingerprint, self._skip, known=self._layouts)
        if len(self._layouts) > _LAYOUTS_KEPT:
            self._layouts.clear()
        self._layouts.update(layout.key for layout in header.layouts.values())
        taken: list[tuple[ArenaClass, int]] = []
        for layout in header.layouts.values():
            arena_class = self._class_of(layout)
            slot = arena_class.take(digest)
            if slot is None:
                for other, other_slot in taken:
                    other.give_back(other_slot)
                return None
            taken.append((arena_class, slot))
        self._take_pages(taken)
        by_kind = self._bytes_by_kind(header)
        return Reservation(
            digest=digest, header=header, slots=tuple(taken), num_bytes=sum(by_kind.values()), bytes_by_kind=by_kind
        )

    def can_hold(self, header: TenantHeader) -> bool:
        """Whether the tenant would find its slots if nobody else had any."""
        return sum(self._class_of(layout).least_bytes for layout in header.layouts.values()) <= self._memory.num_bytes

    def rivals(self, header: TenantHeader) -> tuple[set[str], list[frozenset[str]]]:
        """Who could make way for a slot that `reserve` did not find: any one of the first, who hold slots of the same
        class, or all of one of the others, the smallest first, whose memory another class can have then."""
        wanted = [c for c in map(self._class_of, header.layouts.values()) if c.is_full()]
        crowds = {crowd for arena_class in self._classes.values() for crowd in arena_class.crowds()}
        return {owner for c in wanted for owner in c.owners.values()}, sorted(crowds, key=len)

    def fill(self, reservation: Reservation, path: str | Path, witness: Witness | None = None) -> ResidentTenant:
        """Read the native file into the reserved slots. Blocking. The caller releases the reservation if this raises.

        That its numbers are finite was checked when it was registered, and the digest says that these are its bytes,
        or the witness does, who saw it hashed before.
        Raises OSError; CorruptFile when they are not, or a sparse delta points outside its matrix.
        """
        header = reservation.header
        slots = list(zip(reservation.slots, header.layouts.values(), strict=True))
        memory: dict[str, Tensor] = {}
        for (arena_class, slot), layout in slots:
            memory |= arena_class.memory(slot, layout)
        read = read_into(path, header, reservation.digest, memory, witness)
        for (arena_class, slot), layout in slots:
            arena_class.settle(slot, layout, self._config, checked=read.is_known)
        if witness is not None:
            witness.verified(reservation.digest, header, read.found)
        return ResidentTenant(
            reservation=reservation,
            head=read_head(header, read.tensors),
            self_tests=self._own_tests(header, read.tensors),
            exits=read_exits(header, read.tensors),
        )

    def _own_tests(self, header: TenantHeader, tensors: Mapping[str, Tensor]) -> tuple[SelfTest, ...]:
        """Those of the paths that there are here; none where the file does not test each of them, and each exit."""
        paths = header.paths_on(self._skip)
        tests = tuple(test for test in read_self_tests(header, tensors) if test.path in paths)
        wanted = {(path, layer) for path in paths for layer in (0, *(each.layer for each in header.exits))}
        return tests if {(test.path, test.exit) for test in tests} == wanted else ()

    def release(self, tenant: ResidentTenant | Reservation) -> None:
        """Give the slots back. The caller knows that no batch uses them."""
        for arena_class, slot in tenant.slots:
            if arena_class.owners.get(slot) != tenant.digest:
                raise ShapeError(f"slot {slot} of {arena_class.kind} is not owned by {tenant.digest[:12]}")
            arena_class.give_back(slot)
            self._idle[arena_class, slot] = None

    def _take_pages(self, taken: Sequence[tuple[ArenaClass, int]]) -> None:
        """Count the slots, and let idle ones pay for them where `max_bytes` would be exceeded."""
        for arena_class, slot in taken:
            if (arena_class, slot) in self._idle:
                del self._idle[arena_class, slot]
            else:
                self._slot_bytes += arena_class.slot_bytes
        while self._slot_bytes > self._max_bytes and self._idle:
            arena_class, slot = next(iter(self._idle))
            del self._idle[arena_class, slot]
            arena_class.return_pages(slot)
            self._slot_bytes -= arena_class.slot_bytes

    def _class_of(self, layout: SlotLayout) -> ArenaClass:
        key, width = _class_key(layout)
        if key not in self._classes:
            self._classes[key] = ArenaClass(layout, width, self._dtype, self._memory)
        return self._classes[key]

    def _bytes_by_kind(self, header: TenantHeader) -> dict[str, int]:
        by_kind = {kind: slot_bytes(layout, self._dtype) for kind, layout in header.layouts.items()}
        heads = (header.layer_shapes, *header.exit_shapes)
        by_kind["head"] = sum((out + out * into) * 4 for shapes in heads for out, into in shapes)
        return by_kind


def _head_on(head: Head, device: torch.device) -> Head:
    layers = (
        replace(d, weight=d.weight.to(device), bias=None if d.bias is None else d.bias.to(device)) for d in head.layers
    )
    return replace(head, layers=tuple(layers))


def slot_bytes(layout: SlotLayout, dtype: torch.dtype) -> int:
    """Bytes of one slot: values in the compute dtype; for sparse also the 32-bit columns and row starts."""
    _, width = _class_key(layout)
    if layout.kind != "sparse":
        return width * dtype.itemsize
    return width * (dtype.itemsize + 4) + 4 * sum(int(e.variant) + 1 for e in layout.entries)


def _class_key(layout: SlotLayout) -> tuple[str, int]:
    """Which class a layout belongs to, and its slot width in numbers.

    Sparse tenants never have the same number of non-zeros, so theirs is rounded up to 1, 1.25, 1.5 or 1.75 times a
    power of two: at most a quarter of a slot is unused, and tenants of one method share a class.
    """
    if layout.kind != "sparse":
        return layout.key, layout.numel
    step = max(16, 1 << max(0, layout.numel.bit_length() - 3))
    width = -(-layout.numel // step) * step
    sites = ",".join(f"{e.layer}.{e.site}.{e.variant}" for e in layout.entries)
    return f"sparse:{width}:{hashlib.sha256(sites.encode()).hexdigest()[:16]}", width
