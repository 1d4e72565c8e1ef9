"""A packed batch: rows of all sequences one after the other, no padding, the rows of one tenant contiguous.

Home of the dimension letters: B sequences, T packed tokens, S tenant segments, L layers, H hidden, A heads, D head
size, F feed-forward, R rank or bottleneck, P slots of an arena class, C chunks of `c` rows. This module knows rows and
lengths; it does not know what a tenant computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vbert.config import EncoderConfig
from vbert.errors import ShapeError

__all__ = [
    "BLOCK_ROWS",
    "AttentionBucket",
    "AttentionPlan",
    "PackedRows",
    "Segments",
    "copy_integers",
    "plan_attention",
]

Ints = NDArray[np.int64]
BLOCK_ROWS = 32  # rows that share one walk over a slot, one unit of work of a kernel
_CHUNK_OVERHEAD_ROWS = 6  # one more chunk costs about as much as this many more rows (two small batched products)
_MAX_PADDING = 0.25  # part of an attention bucket that may be padding
_MIN_PADDING_TOKENS = 4


class Segments:
    """The rows of a batch that use one arena class: segment s is rows start[s] <= i < stop[s] and slot slot[s].

    slot, start, stop: [S] int64; ranges ascend and do not overlap; empty segments are allowed.
    """

    def __init__(self, slot: Ints, start: Ints, stop: Ints) -> None:
        keep = stop > start
        self.slot, self.start, self.stop = slot[keep], start[keep], stop[keep]
        self._device_blocks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.slot)

    @cached_property
    def only(self) -> tuple[int, slice]:
        """Slot and rows where there is one segment."""
        ((slot, start, stop),) = zip(self.slot.tolist(), self.start.tolist(), self.stop.tolist(), strict=True)
        return slot, slice(start, stop)

    @cached_property
    def contiguous(self) -> bool:
        return bool((self.start[1:] == self.stop[:-1]).all())

    @cached_property
    def rows(self) -> Tensor:
        """[n] int64: every row of every segment, ascending."""
        return torch.from_numpy(np.concatenate([np.arange(a, b) for a, b in zip(self.start, self.stop, strict=True)]))

    @cached_property
    def row_index(self) -> NDArray[np.uint64]:
        """[n, 2]: each row of `rows` and its slot, for kernels."""
        return np.stack([self.rows.numpy(), np.repeat(self.slot, self.stop - self.start)], 1).astype(np.uint64)

    @cached_property
    def blocks(self) -> NDArray[np.uint64]:
        """[n, 3]: the segments cut into pieces of at most BLOCK_ROWS: slot, first row and number of rows of each."""
        size = BLOCK_ROWS
        pieces = -(-(self.stop - self.start) // size)
        nth = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        start = np.repeat(self.start, pieces) + nth * size
        count = np.minimum(size, np.repeat(self.stop, pieces) - start)
        return np.stack([np.repeat(self.slot, pieces), start, count], 1).astype(np.uint64)

    def device_blocks(self, device: torch.device) -> Tensor:
        """[n, 3] int32 `blocks` on a device, for CUDA kernels: there already where the batch was moved."""
        if self._device_blocks is None:
            (self._device_blocks,) = copy_integers([self.blocks], device)
        return self._device_blocks

    def use_device_blocks(self, blocks: Tensor) -> None:
        """Give the blocks that `device_blocks` returns: [n, 3] int32, those of no rows belonging to nobody."""
        self._device_blocks = blocks

    @cached_property
    def _chunk_rows(self) -> int:
        """Rows of one chunk: batched products want equal shapes, so segments are cut (and the last cut padded)."""
        lengths = self.stop - self.start
        candidates = {4, 8, 16, 32, 64, 128} | ({int(lengths[0])} if (lengths == lengths[0]).all() else set())

        def cost(c: int) -> int:
            chunks = int((-(-lengths // c)).sum())
            return chunks * (c + _CHUNK_OVERHEAD_ROWS)

        return min(sorted(candidates), key=cost)

    @cached_property
    def _chunks(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Slot of each chunk [C]; row each chunk row reads [C * c]; chunk row of each real row [n].

        The last two are None where a view of the rows will do.
        """
        c, lengths = self._chunk_rows, self.stop - self.start
        per_segment = -(-lengths // c)
        slots = torch.from_numpy(np.repeat(self.slot, per_segment))
        if self.contiguous and (lengths % c == 0).all():
            return slots, None, None
        first = np.repeat(np.cumsum(per_segment) - per_segment, per_segment)
        begin = np.repeat(self.start, per_segment) + (np.arange(len(slots)) - first) * c
        reads = begin[:, None] + np.arange(c)[None, :]
        real = reads < np.repeat(self.stop, per_segment)[:, None]
        reads = np.where(real, reads, begin[:, None])
        return slots, torch.from_numpy(reads.reshape(-1)), torch.from_numpy(np.flatnonzero(real))

    @property
    def chunk_slots(self) -> Tensor:
        """[C] int64."""
        return self._chunks[0]

    def gather(self, part: Tensor) -> Tensor:
        """[P, *shape] -> [C, *shape]: one part of the slot of each chunk."""
        # as rows of numbers: indexing the view with its inner shape is 50 times slower
        return part.flatten(1).index_select(0, self.chunk_slots).view(-1, *part.shape[1:])

    def take(self, x: Tensor) -> Tensor:
        """[T, H] -> [C, c, H]: the rows of the segments in chunks; a view where they already lie so."""
        slots, reads, _ = self._chunks
        if reads is None:
            rows = x[int(self.start[0]) : int(self.stop[-1])]
            return rows.view(len(slots), self._chunk_rows, x.shape[1])
        return x.index_select(0, reads).view(len(slots), self._chunk_rows, x.shape[1])

    def add_(self, out: Tensor, delta: Tensor) -> None:
        """out[rows] += delta, delta being chunks [C, c, H] as `take` cut them; padding rows are dropped."""
        _, reads, real = self._chunks
        flat = delta.flatten(0, 1) if reads is None or real is None else delta.flatten(0, 1).index_select(0, real)
        if self.contiguous:
            out[int(self.start[0]) : int(self.stop[-1])].add_(flat)
        else:
            out.index_add_(0, self.rows, flat)


def copy_integers(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Arrays of integers below 2^31 to a device, int32, in one copy from pinned memory that nobody waits for."""
    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]).astype(np.int32))
    if device.type == "cuda":
        flat = flat.pin_memory()  # kept by torch until the copy is done
    pieces = torch.split(flat.to(device, non_blocking=True), [array.size for array in arrays])
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]


@dataclass(frozen=True, slots=True)
class AttentionBucket:
    """Sequences of nearly the same length, padded to the longest for the attention scores only.

    first: where its rows begin in the gathered buffer. mask: [n, 1, 1, L] bool, True where a key exists; None where
    nothing is padded.
    """

    first: int
    count: int
    length: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Buckets, and how rows travel to them and back.

    gather: [sum n L] row each bucket row reads; scatter: [T] bucket row of each packed row. Both None when the batch is
    one bucket without padding in packed order.
    """

    buckets: tuple[AttentionBucket, ...]
    gather: Tensor | None
    scatter: Tensor | None

    def tensors(self) -> list[Tensor]:
        """What `moved` takes, in its order."""
        given = [self.gather, self.scatter, *(bucket.mask for bucket in self.buckets)]
        return [tensor for tensor in given if tensor is not None]

    def moved(self, there: Iterator[Tensor]) -> AttentionPlan:
        """The same plan with its tensors on another device, where they came as integers."""
        gather, scatter = (None if t is None else next(there) for t in (self.gather, self.scatter))
        buckets = (b if b.mask is None else replace(b, mask=next(there).bool()) for b in self.buckets)
        return AttentionPlan(tuple(buckets), gather, scatter)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Token rows of a batch.

    token_ids, type_ids, position_ids: [T] int64.  cu_seqlens: [B + 1] int64, first 0, last T.  longest: tokens of the
    longest sequence.  On a GPU the tensors are int32, and cu_seqlens_dev is cu_seqlens there.
    """

    token_ids: Tensor
    type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Ints
    longest: int
    attention: AttentionPlan
    cu_seqlens_dev: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.cu_seqlens[-1])

    def arrays(self, *, buckets: bool) -> list[NDArray[Any]]:
        """What a GPU needs of the batch, in the order `moved` takes it; the attention's plan where asked for."""
        plan = self.attention.tensors() if buckets else []
        ids = [tensor.numpy() for tensor in (self.token_ids, self.type_ids, self.position_ids)]
        return [*ids, self.cu_seqlens, *(tensor.numpy() for tensor in plan)]

    def moved(self, there: Iterator[Tensor], *, buckets: bool) -> PackedRows:
        token_ids, type_ids, position_ids, cu_seqlens = (next(there) for _ in range(4))
        return PackedRows(
            token_ids=token_ids,
            type_ids=type_ids,
            position_ids=position_ids,
            cu_seqlens=self.cu_seqlens,
            longest=self.longest,
            attention=self.attention.moved(there) if buckets else AttentionPlan((), None, None),
            cu_seqlens_dev=cu_seqlens,
        )

    @classmethod
    def build(
        cls, token_ids: Sequence[Sequence[int]], type_ids: Sequence[Sequence[int]], config: EncoderConfig
    ) -> PackedRows:
        """Pack sequences in the order given. Each needs at least one token and at most config.max_length. Raises
        ShapeError where one has not as many types as tokens."""
        counts = [len(ids) for ids in token_ids]
        if counts != [len(ids) for ids in type_ids]:
            raise ShapeError(f"sequences of {counts} tokens do not fit type ids of {[len(ids) for ids in type_ids]}")
        lengths, cu_seqlens = np.array(counts, np.int64), np.array([0, *accumulate(counts)], np.int64)
        flat, types = (np.fromiter(chain.from_iterable(ids), np.int64, cu_seqlens[-1]) for ids in (token_ids, type_ids))
        positions = _positions(flat, cu_seqlens, lengths, config)
        return cls(
            token_ids=torch.from_numpy(flat),
            type_ids=torch.from_numpy(types),
            position_ids=torch.from_numpy(positions),
            cu_seqlens=cu_seqlens,
            longest=int(lengths.max()),
            attention=plan_attention(lengths),
        )


def plan_attention(lengths: Ints) -> AttentionPlan:
    """Group sequences of similar length so that the attention scores hold little padding.

    lengths: [B] int64, each at least 1, in packed order.
    """
    starts = np.cumsum(lengths) - lengths
    if (lengths == lengths[0]).all():
        return AttentionPlan((AttentionBucket(0, len(lengths), int(lengths[0]), None),), None, None)
    order = np.argsort(-lengths, kind="stable")
    buckets: list[AttentionBucket] = []
    gather: list[Ints] = []
    scatter = np.empty(int(lengths.sum()), np.int64)
    first = i = 0
    while i < len(order):
        longest = int(lengths[order[i]])
        j = i + _bucket_size(lengths[order[i:]], longest)
        members = order[i:j]
        offsets = np.arange(longest)[None, :]
        real = offsets < lengths[members][:, None]
        rows = np.where(real, starts[members][:, None] + offsets, starts[members][:, None])
        scatter[rows[real]] = first + np.flatnonzero(real)
        gather.append(rows.reshape(-1))
        mask = None if real.all() else torch.from_numpy(real)[:, None, None, :]
        buckets.append(AttentionBucket(first, j - i, longest, mask))
        first += (j - i) * longest
        i = j
    return AttentionPlan(tuple(buckets), torch.from_numpy(np.concatenate(gather)), torch.from_numpy(scatter))


def _bucket_size(descending: Ints, longest: int) -> int:
    """How many of the sequences, longest first, share one bucket before too much of it is padding."""
    fits = (longest - descending <= _MIN_PADDING_TOKENS) | (descending >= longest * (1 - _MAX_PADDING))
    return int(fits.argmin()) if not fits.all() else len(fits)


def _positions(flat: Ints, cu_seqlens: Ints, lengths: Ints, config: EncoderConfig) -> Ints:
    """Position ids as transformers makes them: 0, 1, 2 ...; with an offset, padding tokens stay at pad_token_id."""
    if not config.position_offset:
        plain: Ints = np.arange(len(flat))
        return plain if len(lengths) == 1 else plain - np.repeat(cu_seqlens[:-1], lengths)
    real = (flat != config.pad_token_id).astype(np.int64)
    total = np.concatenate([[0], np.cumsum(real)])
    within = total[1:] - np.repeat(total[cu_seqlens[:-1]], lengths)
    padded: Ints = within * real + config.pad_token_id
    return padded
