"""Read a native file in one system call, its deltas straight into the slots that will hold them."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vbert.errors import CorruptFile
from vbert.header import TenantHeader

__all__ = ["FilesRead", "read_into"]

_FILES_KEPT = 2048  # about 3 KiB each
_SETTLED_NS = 10**9  # a file written this recently may be written again without another time to show for it

Stamp = tuple[int, int, int, int, int]  # what the file system changes when somebody writes to a file


@dataclass(slots=True, eq=False)
class FilesRead:
    """What is known of files that were read and hashed before, the latest ones: their headers, and how the file system
    described them then. Any thread may ask and add."""

    _known: OrderedDict[str, tuple[TenantHeader, Stamp | None]] = field(default_factory=OrderedDict)
    _adding: threading.Lock = field(default_factory=threading.Lock)

    def header(self, digest: str) -> TenantHeader | None:
        """Of the bytes that have this digest."""
        known = self._known.get(digest)
        return None if known is None else known[0]

    def stamp(self, digest: str) -> Stamp | None:
        known = self._known.get(digest)
        return None if known is None else known[1]

    def add(self, digest: str, header: TenantHeader, stamp: Stamp | None) -> None:
        with self._adding:
            self._known[digest] = header, stamp
            self._known.move_to_end(digest)
            if len(self._known) > _FILES_KEPT:
                self._known.popitem(last=False)


def read_into(
    path: str | os.PathLike[str],
    header: TenantHeader,
    digest: str,
    slots: Mapping[str, Tensor],
    files: FilesRead | None = None,
) -> dict[str, Tensor]:
    """Read every tensor of a native file, those named in `slots` into the memory given there.

    slots: tensor name -> contiguous CPU tensor [numel]. A slot of another dtype than the file's is converted.
    files: a file that is there with this digest, and that the file system says nobody wrote to since, is not hashed
    again, only its header is. Returns: the other tensors by name. Raises OSError; CorruptFile when the bytes are not
    those of the digest; then there may be anything in the slots.
    """
    files = FilesRead() if files is None else files
    stored = sorted(header.tensors.items(), key=lambda item: item[1].begin)
    direct = {name: slot for name, slot in slots.items() if slot.dtype == header.tensors[name].dtype}
    read = {name: direct[name] if name in direct else torch.empty(t.shape, dtype=t.dtype) for name, t in stored}
    start = bytearray(header.data_begin)
    pieces = [memoryview(start), *(_bytes_of(read[name]) for name, _ in stored)]
    stamp = _read_whole(Path(path), pieces)
    sha256 = hashlib.sha256(start)
    intact = sha256.hexdigest() == header.key
    if intact and (stamp is None or stamp != files.stamp(digest)):
        for piece in pieces[1:]:
            sha256.update(piece)
        intact = sha256.hexdigest() == digest
    if not intact:
        raise CorruptFile(f"the stored file of {digest[:12]} was altered or cut; add the tenant again")
    files.add(digest, header, stamp)
    for name in slots.keys() - direct.keys():
        slots[name].copy_(read[name])
    return {name: tensor for name, tensor in read.items() if name not in slots}


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _read_whole(path: Path, pieces: Sequence[memoryview]) -> Stamp | None:
    """Fill the pieces from the start of a file. What a shorter file leaves is as it was.

    Returns: how the file system described the file before; None if that may not tell it from what it is later.
    """
    left = [piece for piece in pieces if len(piece)]
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        offset = 0
        while left and (count := os.preadv(descriptor, left, offset)):
            offset += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]
    finally:
        os.close(descriptor)
    if time.time_ns() - found.st_ctime_ns < _SETTLED_NS:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
