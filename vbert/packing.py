"""Sequences and tenants to one packed batch, and the batch to a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vbert.arena import ResidentTenant
from vbert.batch import PackedRows, copy_integers
from vbert.config import EncoderConfig
from vbert.deltas import BatchDeltas
from vbert.tenant import Head

__all__ = ["PackedBatch", "SequenceInput"]


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """One tokenised sequence and who it is for; tenant None: the bare backbone with its own embedding head."""

    token_ids: Sequence[int]
    type_ids: Sequence[int]
    tenant: ResidentTenant | None = None


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences packed so that the rows of one tenant, and of one arena class where possible, are contiguous.

    order[j]: which of the given sequences lies at packed position j. heads: [B], in packed order.
    """

    rows: PackedRows
    deltas: BatchDeltas
    heads: tuple[Head, ...]
    order: tuple[int, ...]
    tenants: tuple[ResidentTenant, ...]  # distinct

    @classmethod
    def build(cls, sequences: Sequence[SequenceInput], config: EncoderConfig, embed_head: Head) -> PackedBatch:
        """Pack at least one sequence; each has between 1 and config.max_length tokens."""
        order = sorted(range(len(sequences)), key=lambda i: _packing_key(sequences[i].tenant))
        packed = [sequences[i] for i in order]
        rows = PackedRows.build([s.token_ids for s in packed], [s.type_ids for s in packed], config)
        firsts = [j for j, s in enumerate(packed) if j == 0 or s.tenant is not packed[j - 1].tenant]
        tenants = [packed[j].tenant for j in firsts]
        starts = [int(rows.cu_seqlens[j]) for j in (*firsts, len(packed))]
        return cls(
            rows=rows,
            deltas=BatchDeltas(tenants, starts),
            heads=tuple(s.tenant.head if s.tenant else embed_head for s in packed),
            order=tuple(order),
            tenants=tuple(t for t in tenants if t is not None),
        )

    def on(self, device: torch.device, *, buckets: bool) -> PackedBatch:
        """The same batch for a GPU: its integers there, in one copy on the current stream that nobody waits for.

        buckets: whether attention needs its plan of padded buckets. On a CPU, or when already there, the batch itself.
        """
        if self.rows.token_ids.device.type == device.type:
            return self
        segments = [use.segments for use in self.deltas.uses]
        arrays = [*self.rows.arrays(buckets=buckets), *(rows.blocks for rows in segments)]
        there = iter(copy_integers(arrays, device))
        rows = self.rows.moved(there, buckets=buckets)
        for own in segments:
            own.use_device_blocks(next(there))
        return replace(self, rows=rows)


def _packing_key(tenant: ResidentTenant | None) -> tuple[str, str]:
    """Tenants of the same classes lie side by side, so that their operators read one contiguous range of rows."""
    if tenant is None:
        return "", ""
    return " ".join(sorted(c.layout.key for c, _ in tenant.slots)), tenant.digest
