"""CUDA graphs of whole forwards: a batch that looks like an earlier one is replayed in one launch.

What a graph bakes in is the batch's *signature*: which arena classes it uses, and sizes rounded up so that live traffic
repeats them. All that differs between batches of one signature is integers (token ids, sequence bounds, which slot does
which rows), and they lie in one static buffer that is filled before a replay. Rows that fill up a size belong to
nobody: no sequence holds them, no block of work names them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vbert.arena import ArenaClass
from vbert.batch import AttentionPlan, PackedRows, Segments
from vbert.packing import PackedBatch
from vbert.workspace import Workspace

__all__ = ["Graph", "HiddenGraphs", "Signature", "capture_on_cuda", "round_up"]

_MAX_GRAPHS = 64  # each keeps its largest intermediate results
_WORTH_A_GRAPH = 3  # a signature is captured when it comes this often: a capture costs some hundred forwards
_MAX_COUNTED = 4096  # signatures whose visits are remembered

_REPLAYS_TIMED = 5
Forward = Callable[[PackedBatch, Workspace, int], Tensor]  # the last: on how many streams operators run


class Capture(Protocol):
    """Runs a function once and remembers its launches: what it returned, and a function that repeats them."""

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]: ...


def round_up(n: int, least: int) -> int:
    """n rounded up to `least`, or to one of eight steps for each doubling beyond it: at most an eighth is padding."""
    step = max(least, 1 << max(0, n.bit_length() - 4))
    return -(-n // step) * step


@dataclass(frozen=True, slots=True)
class Signature:
    """What a captured forward depends on beside the contents of its buffer. blocks: of each class, in order. groups:
    as `BatchDeltas` has them, because classes that share no row here may run side by side."""

    tokens: int
    sequences: int
    longest: int
    classes: tuple[ArenaClass, ...]
    blocks: tuple[int, ...]
    groups: tuple[int, ...]

    @classmethod
    def of(cls, batch: PackedBatch) -> Signature:
        rows, uses = batch.rows, batch.deltas.uses
        return cls(
            tokens=round_up(rows.num_tokens, 64),
            sequences=round_up(len(rows.cu_seqlens) - 1, 8),
            longest=1 << max(4, (rows.longest - 1).bit_length()),
            classes=tuple(use.arena_class for use in uses),
            blocks=tuple(round_up(len(use.segments.blocks), 8) for use in uses),
            groups=batch.deltas.groups,
        )

    @property
    def sizes(self) -> list[int]:
        """Integers of each part of the buffer: three for each token, the bounds, three for each block."""
        return [self.tokens] * 3 + [self.sequences + 1] + [3 * n for n in self.blocks]

    def integers(self, batch: PackedBatch) -> NDArray[np.int32]:
        """The contents of the buffer for a batch of this signature, int32."""
        total = batch.rows.num_tokens
        parts = [*batch.rows.arrays(buckets=False), *(use.segments.blocks for use in batch.deltas.uses)]
        fill = [0, 0, 0, total] + [0] * len(self.blocks)  # sequences of no tokens, blocks of no rows
        padded = [_padded(*three) for three in zip(parts, self.sizes, fill, strict=True)]
        return np.concatenate(padded)


class Graph:
    """One captured forward. `run` on the stream that all forwards use; `replay` computes the last batch again."""

    def __init__(
        self,
        forward: Forward,
        space: Workspace,
        batch: PackedBatch,
        capture: Capture,
        stream_counts: Sequence[int] = (1,),
    ) -> None:
        """batch: one of the signature, in host memory.  space: for this graph alone, which keeps its addresses.
        stream_counts: it is captured with each of these numbers of streams, and the fastest is kept."""
        self._signature = Signature.of(batch)
        self._space = space  # the captured kernels write there
        self._buffer = torch.from_numpy(self._signature.integers(batch)).to(space.device)
        static = _static(batch, self._signature, self._buffer)
        captured = (capture(partial(forward, static, space, count)) for count in stream_counts)
        self.replay, self._hidden = next(captured) if len(stream_counts) == 1 else min(captured, key=_replay_ms)

    def run(self, batch: PackedBatch) -> Tensor:
        """Last hidden states [T, H] of a batch of this signature."""
        host = torch.from_numpy(self._signature.integers(batch))
        if self._buffer.is_cuda:
            host = host.pin_memory()
        self._buffer.copy_(host, non_blocking=True)
        self.replay()
        return self._hidden[: batch.rows.num_tokens].clone()  # the next replay writes there


class HiddenGraphs:
    """The graphs of one model, the least recently used of which go. Used by one thread."""

    def __init__(
        self,
        forward: Forward,
        new_space: Callable[[], Workspace],
        capture: Capture,
        stream_counts: Callable[[PackedBatch], Sequence[int]] = lambda _: (1,),
    ) -> None:
        """forward: all layers of a batch that is on the device, without waiting for anything. stream_counts: to try."""
        self._forward, self._new_space, self._capture = forward, new_space, capture
        self._stream_counts = stream_counts
        self._graphs: OrderedDict[Signature, Graph] = OrderedDict()
        self._seen: Counter[Signature] = Counter()

    def clear(self) -> None:
        """Let go of all graphs and their memory. Nothing that was replayed may still run."""
        self._graphs.clear()

    def find(self, batch: PackedBatch, before_capture: Callable[[], object] = bool) -> Graph | None:
        """The graph for a batch, captured now if its signature came often enough; None: compute it plainly.

        before_capture: called before the batch is computed to capture it.
        """
        signature = Signature.of(batch)
        if signature not in self._graphs:
            if len(self._seen) >= _MAX_COUNTED:
                self._seen.clear()
            self._seen[signature] += 1
            if self._seen[signature] < _WORTH_A_GRAPH:
                return None
            if len(self._graphs) == _MAX_GRAPHS:
                self._graphs.popitem(last=False)
            del self._seen[signature]
            before_capture()
            counts = self._stream_counts(batch)
            self._graphs[signature] = Graph(self._forward, self._new_space(), batch, self._capture, counts)
        self._graphs.move_to_end(signature)
        return self._graphs[signature]


def _padded(part: NDArray[Any], size: int, fill: int) -> NDArray[np.int32]:
    padded = np.full(size, fill, np.int32)
    padded[: part.size] = part.reshape(-1)
    return padded


def _static(batch: PackedBatch, signature: Signature, buffer: Tensor) -> PackedBatch:
    """A batch of the padded sizes whose tensors are parts of the buffer."""
    token_ids, type_ids, position_ids, cu_seqlens, *blocks = torch.split(buffer, signature.sizes)
    rows = PackedRows(
        token_ids=token_ids,
        type_ids=type_ids,
        position_ids=position_ids,
        cu_seqlens=np.array([0, signature.tokens]),
        longest=signature.longest,
        attention=AttentionPlan((), None, None),
        cu_seqlens_dev=cu_seqlens,
    )
    segments = [_anywhere(signature.tokens, part.view(-1, 3)) for part in blocks]
    return replace(batch, rows=rows, deltas=batch.deltas.with_segments(segments))


def _anywhere(tokens: int, blocks: Tensor) -> Segments:
    """Segments that may be any rows: only the blocks say which."""
    segments = Segments(np.array([0]), np.array([0]), np.array([tokens]))
    segments.use_device_blocks(blocks)
    return segments


def capture_on_cuda(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture a function as a CUDA graph, after runs that compile its kernels and grow its buffers."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Other threads allocate and copy meanwhile: only this one must not.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        hidden = function()
    return graph.replay, hidden


def _replay_ms(captured: tuple[Callable[[], None], Tensor]) -> float:
    """GPU time of a replay, the median of a few."""
    replay = captured[0]
    times: list[float] = []
    replay()
    for _ in range(_REPLAYS_TIMED):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[_REPLAYS_TIMED // 2]
