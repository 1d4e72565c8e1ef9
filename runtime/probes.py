"""Modules to measure with: tenants of a backbone as native files on the disk, and an arena that loads them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from runtime.blobs import digest_of
from vbert.arena import Arena, ResidentTenant
from vbert.checkpoint import write_tenant
from vbert.config import LINEAR_SITES
from vbert.formats.transformers_folder import Backbone
from vbert.formats.transformers_head import own_weights
from vbert.header import read_header
from vbert.tenant import Affine, Bottleneck, Delta, LowRank, Sparse, TenantModule

__all__ = ["Probes"]

_ARENA_BYTES = 16 * 2**30  # address space, not memory
_LOW_RANK_SITES = ("q", "v")
_BOTTLENECK_SITES = ("attn.output>output", "ffn.output>output")


class Probes:
    """folder: the caller deletes it."""

    def __init__(self, backbone: Backbone, dtype: torch.dtype, folder: Path) -> None:
        self._backbone, self._dtype, self._folder = backbone, dtype, folder
        self._arena = Arena(backbone.config, backbone.fingerprint, dtype, _ARENA_BYTES)

    def write(self, size: int, name: str = "", kind: str = "low_rank") -> Path:
        """A native file named by its digest, as in a store, and on the disk. Another name gives another file. size: as
        `CostModel.module_s` has it."""
        data = write_tenant(self._module(kind, size, name), self._dtype)
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

    def _module(self, kind: str, size: int, name: str) -> TenantModule:
        return TenantModule(
            backbone_fingerprint=self._backbone.fingerprint,
            deltas=tuple(self._own_weights() if kind == "weights" else self._all_layers(kind, size)),
            head=self._backbone.embed_head,
            source={"format": "profile", "name": name},
        )

    def _own_weights(self) -> Iterator[Delta]:
        """The backbone's own numbers, in memory of the tenant's own."""
        return own_weights(self._backbone)

    def _all_layers(self, kind: str, size: int) -> Iterator[Delta]:
        for layer in range(self._backbone.config.num_layers):
            yield from self._deltas(kind, layer, size)

    def _deltas(self, kind: str, layer: int, size: int) -> Iterator[Delta]:
        width = self._backbone.config.hidden_size
        if kind == "low_rank":
            down, up = torch.full((width, size), 1e-3), torch.full((size, width), 1e-3)
            for site in _LOW_RANK_SITES:
                yield LowRank(layer=layer, site=site, a=down, b=up)
        elif kind == "bottleneck":
            down, up = torch.full((width, size), 1e-3), torch.full((size, width), 1e-3)
            for site in _BOTTLENECK_SITES:
                yield Bottleneck(
                    layer=layer,
                    site=site,
                    activation="gelu",
                    down=down,
                    down_bias=torch.zeros(size),
                    up=up,
                    up_bias=torch.zeros(width),
                )
        elif kind == "affine":
            for site in LINEAR_SITES:
                yield Affine(layer=layer, site=site, shift=torch.full((self._shape(site)[0],), 1e-3))
        else:
            for site in LINEAR_SITES:
                yield self._sparse(layer, site, size)

    def _sparse(self, layer: int, site: str, per_mille: int) -> Sparse:
        """So many of a thousand weights, spread evenly."""
        rows, columns = self._shape(site)
        changed = torch.arange(0, rows * columns, max(1, 1000 // per_mille))
        starts = torch.zeros(rows + 1, dtype=torch.int32)
        starts[1:] = torch.bincount(changed // columns, minlength=rows).cumsum(0)
        values = torch.full((len(changed),), 1e-3)
        return Sparse(layer=layer, site=site, row_starts=starts, columns=(changed % columns).int(), values=values)

    def _shape(self, site: str) -> tuple[int, int]:
        """[H_out, H_in] of a linear."""
        width, ffn = self._backbone.config.hidden_size, self._backbone.config.ffn_size
        return {"ffn_up": (ffn, width), "ffn_down": (width, ffn)}.get(site, (width, width))
