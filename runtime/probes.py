"""Modules to measure with: LoRA tenants of a backbone as native files on the disk, and an arena that loads them."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from runtime.blobs import digest_of
from vbert.arena import Arena, ResidentTenant
from vbert.checkpoint import write_tenant
from vbert.formats.transformers_folder import Backbone
from vbert.header import read_header
from vbert.tenant import LowRank, TenantModule

__all__ = ["Probes"]

_ARENA_BYTES = 2 * 2**30  # address space, not memory
_SITES = ("q", "v")


class Probes:
    """folder: the caller deletes it."""

    def __init__(self, backbone: Backbone, dtype: torch.dtype, folder: Path) -> None:
        self._backbone, self._dtype, self._folder = backbone, dtype, folder
        self._arena = Arena(backbone.config, backbone.fingerprint, dtype, _ARENA_BYTES)

    def write(self, rank: int, name: str = "") -> Path:
        """A native file named by its digest, as in a store, and on the disk. Another name gives another file."""
        data = write_tenant(self._module(rank, name), self._dtype)
        path = self._folder / digest_of(data)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return path

    def num_bytes(self, path: Path) -> int:
        """What the module takes in memory, as residency counts."""
        return self._arena.num_bytes(read_header(path))

    def load(self, path: Path) -> ResidentTenant:
        """Header, slots, bytes, checksum: all that the manager does but the self-test."""
        header = read_header(path)
        reservation = self._arena.reserve(header, path.name)
        assert reservation is not None, "the arena has room for all probes"
        return self._arena.fill(reservation, path)

    def load_and_release(self, path: Path) -> None:
        self._arena.release(self.load(path))

    def forget(self, path: Path) -> None:
        """Drop the file from the page cache."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def _module(self, rank: int, name: str) -> TenantModule:
        config, width = self._backbone.config, self._backbone.config.hidden_size
        down, up = torch.full((width, rank), 1e-3), torch.full((rank, width), 1e-3)
        deltas = [LowRank(layer=i, site=site, a=down, b=up) for i in range(config.num_layers) for site in _SITES]
        return TenantModule(
            backbone_fingerprint=self._backbone.fingerprint,
            deltas=tuple(deltas),
            head=self._backbone.embed_head,
            source={"format": "profile", "name": name},
        )
