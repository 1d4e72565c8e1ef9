"""Sequences and tenants to one packed batch, and the batch to a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vbert.arena import ResidentTenant
from vbert.batch import PackedRows, copy_integers
from vbert.config import EncoderConfig
from vbert.deltas import BatchDeltas
from vbert.entry import Entry, Tokens
from vbert.errors import ShapeError
from vbert.ngram.index import shortened
from vbert.skip import SLOTS, SkipConfig
from vbert.tenant import Head

__all__ = ["Junction", "PackedBatch", "SequenceInput", "Ways", "own_ways", "pack_joined"]


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """One tokenised sequence and who it is for; tenant None: the bare backbone with its own embedding head.

    scope: who may share what its lower layers give, see runtime/sequence_store.py; None: nobody does. paths: the ways
    through the lower layers that may be chosen among: those of vbert.tenant.PATHS; `compute`, which is `exact` without
    a look at what is stored; `shortened`, the same with n-grams shortened as a self-test of `backoff` has them.
    domain: which n-gram tables are asked first.
    """

    token_ids: Sequence[int]
    type_ids: Sequence[int]
    tenant: ResidentTenant | None = None
    scope: bytes | None = None
    paths: tuple[str, ...] = ("plain",)
    domain: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """How the sequences of a batch come to a layer.

    first: [B], the sequence whose lower layers serve each one as well. given: those whose states are at hand, in the
    order of their rows. skipping: those of `entry`, in its order. shares: [B], whose lower layers are the bare
    backbone's. wanted: computed sequences whose states are to be kept, in that order.
    """

    layer: int
    first: Sequence[int]
    shares: Sequence[bool]
    given: Sequence[int] = ()
    skipping: Sequence[int] = ()
    entry: Entry | None = None
    wanted: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Junction:
    """Where other rows come up from the lower layers than go on: sequences are computed once, or their states given.

    layer: the first that all rows of the batch go through. lower: what is computed below it, if anything. source: [T],
    for each row of the batch its row among those of `lower`, the given ones after them and then those of `entry`; None:
    they are the same, and `lower` is the batch. kept: [n], rows of `lower` that others may want later. Both int64, on a
    GPU int32. entry: of sequences that skip, if any.
    """

    layer: int
    lower: PackedBatch | None
    num_given: int
    source: Tensor | None
    kept: Tensor
    entry: Entry | None = None

    def on(self, device: torch.device, batch: PackedBatch, buckets: bool) -> Junction:
        """The same for a GPU. batch: the one it belongs to, which is there already."""
        integers = [self.kept.numpy(), *([] if self.source is None else [self.source.numpy()])]
        kept, *source = copy_integers(integers, device)
        if self.source is None:
            return replace(self, lower=batch, kept=kept)
        lower = None if self.lower is None else self.lower.on(device, buckets=buckets)
        return replace(self, lower=lower, kept=kept, source=source[0])


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
    junction: Junction | None = None

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

    @property
    def entering(self) -> PackedBatch | None:
        """What goes through the embeddings and the lowest layers."""
        return self if self.junction is None else self.junction.lower

    def work(self, num_layers: int, local_layers: int = 0) -> float:
        """Rows times the layers that they go through, as a share of what it is without a junction. local_layers: of a
        skip part."""
        if self.junction is None:
            return 1.0
        rows, layer = len(self.rows.token_ids), self.junction.layer
        lower = 0 if self.junction.lower is None else len(self.junction.lower.rows.token_ids)
        local = 0 if self.junction.entry is None else SLOTS * len(self.junction.entry.missing)
        return (layer * lower + local_layers * local + (num_layers - layer) * rows) / (num_layers * rows)

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
        moved = replace(self, rows=rows, junction=None)
        return moved if self.junction is None else replace(moved, junction=self.junction.on(device, moved, buckets))


def pack_joined(sequences: Sequence[SequenceInput], config: EncoderConfig, embed_head: Head, ways: Ways) -> PackedBatch:
    """A batch with a junction before `ways.layer`."""
    batch = PackedBatch.build(sequences, config, embed_head)
    lengths = np.array([len(s.token_ids) for s in sequences])
    at_hand = [*ways.given, *ways.skipping]
    begin = np.zeros(len(sequences), np.int64)  # of each sequence that comes up
    if not at_hand and all(i == j for i, j in enumerate(ways.first)):  # the lower layers see the same rows
        begin[list(batch.order)] = batch.rows.cu_seqlens[:-1]
        return replace(batch, junction=Junction(ways.layer, batch, 0, None, _ranges(begin, lengths, ways.wanted)))
    there = set(at_hand)
    computed = [i for i in range(len(sequences)) if ways.first[i] == i and i not in there]
    lower, num_rows = None, 0
    if computed:
        bare = [replace(sequences[i], tenant=None) if ways.shares[i] else sequences[i] for i in computed]
        lower = PackedBatch.build(bare, config, embed_head)
        for j, k in enumerate(lower.order):
            begin[computed[k]] = lower.rows.cu_seqlens[j]
        num_rows = int(lower.rows.cu_seqlens[-1])
    for i in at_hand:
        begin[i], num_rows = num_rows, num_rows + lengths[i]
    kept = _ranges(begin, lengths, ways.wanted)
    source = _ranges(begin[np.array(ways.first)], lengths, batch.order)
    num_given = int(lengths[list(ways.given)].sum())
    return replace(batch, junction=Junction(ways.layer, lower, num_given, source, kept, ways.entry))


def own_ways(sequences: Sequence[SequenceInput], skip: SkipConfig) -> Ways | None:
    """The ways that need no store: plain where a sequence may, else all n-grams computed. None: all are plain.

    Raises ShapeError for a path that cannot be computed: `backoff` is nothing without tables.
    """
    paths = ["plain" if "plain" in s.paths and skip.first_layer else next(iter(s.paths)) for s in sequences]
    if bad := sorted(
        {*paths} - {"plain", "compute", "exact", "shortened"}
        | ({"plain"} & {*paths} if not skip.first_layer else set())
    ):
        raise ShapeError(f"the path {bad[0]!r} cannot be computed on this backbone; give a store, or another path")
    skipping = [i for i, path in enumerate(paths) if path != "plain"]
    if not skipping:
        return None
    tokens = Tokens.of([sequences[i].token_ids for i in skipping], [sequences[i].type_ids for i in skipping], skip)
    lengths = np.diff(tokens.cu_seqlens)
    short = np.repeat([paths[i] == "shortened" for i in skipping], lengths)
    tokens = replace(tokens, keys=shortened(tokens.keys, np.where(short, SLOTS - tokens.positions % SLOTS, SLOTS)))
    return Ways(
        layer=skip.first_layer,
        first=range(len(sequences)),
        shares=[False] * len(sequences),
        skipping=skipping,
        entry=Entry.computed(tokens),
    )


def _ranges(begin: NDArray[np.int64], lengths: NDArray[np.int64], chosen: Sequence[int]) -> Tensor:
    """The numbers begin[i] ... begin[i] + lengths[i] - 1 of every chosen i, one after the other."""
    parts = [np.arange(begin[i], begin[i] + lengths[i]) for i in chosen]
    return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, np.int64))


def _packing_key(tenant: ResidentTenant | None) -> tuple[str, str]:
    """Tenants of the same classes lie side by side, so that their operators read one contiguous range of rows."""
    if tenant is None:
        return "", ""
    return " ".join(sorted(c.layout.key for c, _ in tenant.slots)), tenant.digest
