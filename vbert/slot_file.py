"""Read a native file in one system call, its deltas straight into the slots that will hold them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vbert.errors import CorruptFile
from vbert.header import TenantHeader

__all__ = ["Read", "Witness", "read_into"]


class Witness(Protocol):
    """Who remembers files that were hashed before. Any thread may call."""

    def unchanged(self, digest: str, found: os.stat_result) -> bool:
        """Whether a file of these bytes was verified when the file system described it just so."""
        ...

    def verified(self, digest: str, header: TenantHeader, found: os.stat_result) -> None:
        """The file was hashed, and all that is in it was checked, now or when it was the same."""
        ...


@dataclass(frozen=True, slots=True)
class Read:
    """tensors: those that went into no slot. found: how the file system described the file before. is_known: its bytes
    were not hashed, since a witness saw them before."""

    tensors: dict[str, Tensor]
    found: os.stat_result
    is_known: bool


def read_into(
    path: str | os.PathLike[str],
    header: TenantHeader,
    digest: str,
    slots: Mapping[str, Tensor],
    witness: Witness | None = None,
) -> Read:
    """Read every tensor of a native file, those named in `slots` into the memory given there.

    slots: tensor name -> contiguous CPU tensor [numel]. A slot of another dtype than the file's is converted.
    witness: a file that it knows is not hashed again, only its header is. Raises OSError; CorruptFile when the bytes
    are not those of the digest; then there may be anything in the slots.
    """
    stored = sorted(header.tensors.items(), key=lambda item: item[1].begin)
    direct = {name: slot for name, slot in slots.items() if slot.dtype == header.tensors[name].dtype}
    read = {name: direct[name] if name in direct else torch.empty(t.shape, dtype=t.dtype) for name, t in stored}
    start = bytearray(header.data_begin)
    pieces = [memoryview(start), *(_bytes_of(read[name]) for name, _ in stored)]
    found, unchanged = _read_whole(Path(path), pieces)
    sha256 = hashlib.sha256(start)
    intact = unchanged and sha256.hexdigest() == header.key
    is_known = witness is not None and witness.unchanged(digest, found)
    if intact and not is_known:
        for piece in pieces[1:]:
            sha256.update(piece)
        intact = sha256.hexdigest() == digest
    if not intact:
        raise CorruptFile(f"the stored file of {digest[:12]} was altered or cut; add the tenant again")
    for name in slots.keys() - direct.keys():
        slots[name].copy_(read[name])
    return Read({name: tensor for name, tensor in read.items() if name not in slots}, found, is_known)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _read_whole(path: Path, pieces: Sequence[memoryview]) -> tuple[os.stat_result, bool]:
    """Fill the pieces from the start of a file.

    Returns: how the file system describes the file; whether all was there, and nobody wrote to it meanwhile.
    """
    left = [piece for piece in pieces if len(piece)]
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        before = os.fstat(descriptor)
        offset = 0
        while left and (count := os.preadv(descriptor, left, offset)):
            offset += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    same = (before.st_size, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_ctime_ns,
    )
    return after, same and not left
