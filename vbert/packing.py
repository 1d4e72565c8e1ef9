"""Sequences and tenants to one packed batch, and the batch to a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from vbert.side_streams import Work
from vbert.skip import SLOTS, SkipConfig
from vbert.tenant import Exit, Head

__all__ = ["Junction", "PackedBatch", "SequenceInput", "Ways", "by_weights", "own_ways", "pack_joined"]


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """One tokenised sequence and who it is for; tenant None: the bare backbone with its own embedding head.

    scope: who may share what its lower layers give, see runtime/sequence_store.py; None: nobody does. paths: the ways
    through the lower layers that may be chosen among: those of vbert.tenant.PATHS; `compute`, which is `exact` without
    a look at what is stored; `shortened`, the same with n-grams shortened as a self-test of `backoff` has them.
    domain: which n-gram tables are asked first. exit_above: the answer of an exit of its tenant will do if it is more
    confident than this; 1: none is. exit_from: only exits from this layer on.
    """

    token_ids: Sequence[int]
    type_ids: Sequence[int]
    tenant: ResidentTenant | None = None
    scope: bytes | None = None
    paths: tuple[str, ...] = ("plain",)
    domain: str = ""
    exit_above: float = 1.0
    exit_from: int = 0

    @property
    def exits(self) -> tuple[Exit, ...]:
        """Those it may leave by."""
        if self.tenant is None or self.exit_above >= 1:
            return ()
        return tuple(each for each in self.tenant.exits if each.layer >= self.exit_from)


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
    GPU int32. entry: of sequences that skip, if any. computed: of each sequence that `lower` was given, its place among
    those that the batch was given.
    """

    layer: int
    lower: PackedBatch | None
    num_given: int
    source: Tensor | None
    kept: Tensor
    entry: Entry | None = None
    computed: Sequence[int] = ()

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

    order[j]: which of the given sequences lies at packed position j. sequences, heads: [B], in packed order. exits: by
    layer, the packed positions of those that may leave before it.
    """

    rows: PackedRows
    deltas: BatchDeltas
    heads: tuple[Head, ...]
    order: tuple[int, ...]
    sequences: tuple[SequenceInput, ...]
    exits: Mapping[int, Sequence[int]]
    tenants: tuple[ResidentTenant, ...]  # distinct; one with weights of its own has a batch of its own
    junction: Junction | None = None

    @classmethod
    def build(cls, sequences: Sequence[SequenceInput], config: EncoderConfig, embed_head: Head) -> PackedBatch:
        """Pack at least one sequence; each has between 1 and config.max_length tokens. Raises ShapeError where a tenant
        with weights of its own is not alone."""
        order = sorted(range(len(sequences)), key=lambda i: _packing_key(sequences[i].tenant))
        packed = [sequences[i] for i in order]
        rows = PackedRows.build([s.token_ids for s in packed], [s.type_ids for s in packed], config)
        firsts = [j for j, s in enumerate(packed) if j == 0 or s.tenant is not packed[j - 1].tenant]
        tenants = [packed[j].tenant for j in firsts]
        starts = [int(rows.cu_seqlens[j]) for j in (*firsts, len(packed))]
        if len(tenants) > 1 and any(tenant is not None and tenant.header.is_whole for tenant in tenants):
            raise ShapeError("a tenant with weights of its own shares no batch; see `by_weights`")
        exits: dict[int, list[int]] = {}
        for j, s in enumerate(packed):
            for each in s.exits:
                exits.setdefault(each.layer, []).append(j)
        return cls(
            rows=rows,
            deltas=BatchDeltas(tenants, starts),
            heads=tuple(s.tenant.head if s.tenant else embed_head for s in packed),
            order=tuple(order),
            sequences=tuple(packed),
            exits=exits,
            tenants=tuple(t for t in tenants if t is not None),
        )

    @property
    def whole(self) -> ResidentTenant | None:
        """The tenant whose weights compute this batch; None: the backbone's do."""
        return next((tenant for tenant in self.tenants if tenant.header.is_whole), None)

    def only(self, chosen: Sequence[int], config: EncoderConfig, embed_head: Head) -> PackedBatch:
        """At least one of its sequences, by ascending packed position, without a junction; in host memory."""
        fewer = PackedBatch.build([self.sequences[j] for j in chosen], config, embed_head)
        return replace(fewer, order=tuple(self.order[chosen[k]] for k in fewer.order))

    @property
    def entering(self) -> PackedBatch | None:
        """What goes through the embeddings and the lowest layers."""
        return self if self.junction is None else self.junction.lower

    def work(self, num_layers: int, local_layers: int = 0, exits: Sequence[int] = ()) -> float:
        """Rows times the layers that they go through, as a share of what it is without a junction, or exits.
        local_layers: of a skip part. exits: as `Feed.exited` has them."""
        rows = self.rows.num_tokens
        lengths = np.diff(self.rows.cu_seqlens).tolist()
        gone = [(exits[i], length) for i, length in zip(self.order, lengths, strict=True) if exits and exits[i]]
        joined = 0 if self.junction is None else self.junction.layer  # who left below it came up to it all the same
        saved = sum((num_layers - max(layer, joined)) * length for layer, length in gone)
        if self.junction is not None:
            layer = self.junction.layer
            lower = 0 if self.junction.lower is None else len(self.junction.lower.rows.token_ids)
            local = 0 if self.junction.entry is None else SLOTS * len(self.junction.entry.missing)
            saved += layer * (rows - lower) - local_layers * local
        return 1 - float(saved) / (num_layers * rows)

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

    def side_by_side(self, num_streams: int, run: Callable[[Sequence[Work]], None]) -> PackedBatch:
        """The same batch, whose operators run as `BatchDeltas.side_by_side` has them."""
        lower = None if self.junction is None else self.junction.lower
        beneath = lower and lower.side_by_side(num_streams, run)
        junction = self.junction and replace(self.junction, lower=beneath)
        return replace(self, deltas=self.deltas.side_by_side(num_streams, run), junction=junction)


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
    return replace(batch, junction=Junction(ways.layer, lower, num_given, source, kept, ways.entry, computed))


def by_weights(sequences: Sequence[SequenceInput]) -> list[list[int]]:
    """Places of the sequences that may share a batch: those that the backbone's weights compute, then those of each
    tenant with weights of its own."""
    groups: dict[str, list[int]] = {}
    for i, sequence in enumerate(sequences):
        tenant = sequence.tenant
        groups.setdefault(tenant.digest if tenant is not None and tenant.header.is_whole else "", []).append(i)
    return [groups[key] for key in sorted(groups)]


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
