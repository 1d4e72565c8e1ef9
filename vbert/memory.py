"""Where the slots of an arena lie: address space that costs nothing until it is used, or one buffer cut into slabs.

A `Region` is the room of one class of equal slots. On a CPU every region is a mapping of its own, as large as the
budget: pages come when a slot is first filled and can go back one slot at a time, so that no class keeps another from
the memory. Device and pinned memory have no such pages; there all regions share one buffer, and a region takes runs of
slabs from it as it grows.
"""

from __future__ import annotations

import heapq
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

__all__ = ["AddressSpace", "Memory", "Parts", "Region", "Slabs", "mapped"]

Parts = Sequence[tuple[int, torch.dtype]]  # width in numbers and dtype of each array of a slot

_MAX_SLOTS = 1 << 20
_NORESERVE = 0x4000  # MAP_NORESERVE on Linux; the mmap module names it from Python 3.13 on
_ALIGN = 256  # bytes: a part of a slot begins where any vector load may
_SLOTS_IN_RUN = 8  # as many at once: a run wastes up to one slot
_SLAB_BYTES = 256 * 1024


def mapped(file: BinaryIO) -> mmap.mmap:
    """A whole file as memory, of which only what is touched takes room, so it may be larger than the machine's. Private
    and writable, since torch wants that; nothing that writes here reaches the file. Raises ValueError for an empty
    file, OSError naming it."""
    try:
        flags = mmap.MAP_PRIVATE | _NORESERVE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise OSError(error.errno, f"cannot be mapped: {error.strerror}", file.name) from error


class Region(Protocol):
    """Room for equal slots. arrays: [P, width] of each part, every slot being one row of each."""

    arrays: tuple[Tensor, ...]
    least_bytes: int  # of the memory it takes when it has one slot, as far as it takes any from others

    def take(self) -> int | None:
        """A free slot; None when there is no room for one more."""
        ...

    def give_back(self, slot: int) -> None: ...

    def return_pages(self, slot: int) -> None:
        """Let others have the memory that only this free slot used, where that is possible."""
        ...

    def neighbours(self, slot: int) -> Sequence[int]:
        """The slots that must all be free before another region can have their memory."""
        ...


class Memory(Protocol):
    @property
    def device(self) -> torch.device: ...

    @property
    def num_bytes(self) -> int: ...

    def region(self, parts: Parts) -> Region: ...


# ---- address space -------------------------------------------------------------------------------------------------


class AddressSpace:
    """A mapping for each region. `max_bytes` bounds each region's addresses, not what is resident."""

    device = torch.device("cpu")

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = max_bytes

    def region(self, parts: Parts) -> Region:
        slot_bytes = sum(width * dtype.itemsize for width, dtype in parts)
        return _Mapping(parts, max(1, min(_MAX_SLOTS, self.num_bytes // slot_bytes)))


class _Mapping:
    def __init__(self, parts: Parts, num_slots: int) -> None:
        self._maps: list[tuple[mmap.mmap, int]] = []
        self.arrays = tuple(self._allocate(num_slots, width, dtype) for width, dtype in parts)
        self.least_bytes, self._num_slots, self._untouched = 0, num_slots, 0
        self._free: list[int] = []

    def take(self) -> int | None:
        if self._free:
            return heapq.heappop(self._free)
        if self._untouched == self._num_slots:
            return None
        self._untouched += 1
        return self._untouched - 1

    def give_back(self, slot: int) -> None:
        heapq.heappush(self._free, slot)

    def return_pages(self, slot: int) -> None:
        for memory, row_bytes in self._maps:
            first = -(-slot * row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (slot + 1) * row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                memory.madvise(mmap.MADV_DONTNEED, first, last - first)

    def neighbours(self, slot: int) -> Sequence[int]:
        return (slot,)

    def _allocate(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        row_bytes = width * dtype.itemsize
        memory = mmap.mmap(-1, rows * row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        self._maps.append((memory, row_bytes))
        return torch.frombuffer(memory, dtype=dtype).view(rows, width)


# ---- slabs ---------------------------------------------------------------------------------------------------------


class Slabs:
    """One buffer [num_bytes] uint8, on a device or pinned. Every region sees all of it as its own slots, and may use
    those that lie whole in the runs of slabs it took: slot k of a region begins at k times its stride."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.device, self.num_bytes = buffer, buffer.device, len(buffer)
        self._free = {0: len(buffer) // _SLAB_BYTES}  # first slab -> length of a free run

    def region(self, parts: Parts) -> Region:
        return _SlabRegion(self, parts)

    def take(self, count: int) -> int | None:
        """The first of so many slabs side by side, as near to the end as may be: large slots have places of their own,
        from the beginning on."""
        for free in sorted(self._free, reverse=True):
            if (length := self._free[free]) >= count:
                first = free + length - count
                self._cut(free, first, count)
                return first
        return None

    def take_slot(self, stride: int) -> tuple[int, int] | None:
        """Slabs that a slot of so many bytes lies in, at the first free multiple of them: the first, and how many."""
        for free in sorted(self._free):
            slot = -(-free * _SLAB_BYTES // stride)
            first, end = slot * stride // _SLAB_BYTES, -(-(slot + 1) * stride // _SLAB_BYTES)
            if end <= free + self._free[free]:
                self._cut(free, first, end - first)
                return first, end - first
        return None

    def _cut(self, free: int, first: int, count: int) -> None:
        """So many slabs out of the free run that begins at `free`."""
        end = free + self._free.pop(free)
        if first > free:
            self._free[free] = first - free
        if end > first + count:
            self._free[first + count] = end - first - count

    def give_back(self, first: int, count: int) -> None:
        """Adjoining free runs become one."""
        if after := self._free.pop(first + count, 0):
            count += after
        for other, length in self._free.items():
            if other + length == first:
                self._free[other] = length + count
                return
        self._free[first] = count


@dataclass(slots=True)
class _Run:
    first_slab: int
    num_slabs: int
    slots: range
    used: set[int] = field(default_factory=set)


class _SlabRegion:
    def __init__(self, slabs: Slabs, parts: Parts) -> None:
        offsets, end = [], 0
        for width, dtype in parts:
            offsets.append(end)
            end += -(-width * dtype.itemsize // _ALIGN) * _ALIGN
        self._is_large = end > _SLOTS_IN_RUN * _SLAB_BYTES
        if self._is_large:  # else its neighbours would have a slab in common with it
            end = -(-end // _SLAB_BYTES) * _SLAB_BYTES
        self._slabs, self._stride = slabs, end
        self.arrays = tuple(
            _strided(slabs.buffer, dtype, offset, width, self._stride)
            for offset, (width, dtype) in zip(offsets, parts, strict=True)
        )
        self.least_bytes = self._stride if self._is_large else self._slabs_for(1) * _SLAB_BYTES  # of an empty buffer
        self._run_of: dict[int, _Run] = {}
        self._free: list[int] = []

    def take(self) -> int | None:
        if not self._free and not self._grow():
            return None
        slot = heapq.heappop(self._free)
        self._run_of[slot].used.add(slot)
        return slot

    def give_back(self, slot: int) -> None:
        run = self._run_of[slot]
        run.used.remove(slot)
        heapq.heappush(self._free, slot)
        if not run.used:
            self._shrink(run)

    def return_pages(self, slot: int) -> None:
        """Nothing: a run goes back when its last slot does."""

    def neighbours(self, slot: int) -> Sequence[int]:
        return tuple(self._run_of[slot].used)

    def _grow(self) -> bool:
        """Take a run with room for several slots, but no large part of the buffer, or for one."""
        if (taken := self._take_several() or self._take_one()) is None:
            return False
        first, count = taken
        begin, end = first * _SLAB_BYTES, (first + count) * _SLAB_BYTES
        run = _Run(first, count, range(-(-begin // self._stride), end // self._stride))
        self._run_of |= dict.fromkeys(run.slots, run)
        for slot in run.slots:
            heapq.heappush(self._free, slot)
        return True

    def _take_one(self) -> tuple[int, int] | None:
        if self._is_large:
            return self._slabs.take_slot(self._stride)
        count = self._slabs_for(1)
        first = self._slabs.take(count)
        return None if first is None else (first, count)

    def _take_several(self) -> tuple[int, int] | None:
        count = min(self._slabs_for(_SLOTS_IN_RUN), self._slabs.num_bytes // _SLAB_BYTES // 8)
        first = self._slabs.take(count) if count >= self._slabs_for(1) else None
        return None if first is None else (first, count)

    def _slabs_for(self, slots: int) -> int:
        """Wherever a run begins, so many slots lie whole inside this many slabs."""
        return -(-(slots + 1) * self._stride // _SLAB_BYTES)

    def _shrink(self, run: _Run) -> None:
        self._free = [slot for slot in self._free if slot not in run.slots]
        heapq.heapify(self._free)
        for slot in run.slots:
            del self._run_of[slot]
        self._slabs.give_back(run.first_slab, run.num_slabs)


def _strided(buffer: Tensor, dtype: torch.dtype, offset: int, width: int, stride: int) -> Tensor:
    """[P, width] of `dtype`, rows `stride` bytes apart, the first at byte `offset`."""
    whole = len(buffer) // _ALIGN * _ALIGN
    numbers = buffer[:whole].view(dtype)
    size = dtype.itemsize
    return numbers.as_strided((whole // stride, width), (stride // size, 1), offset // size)
