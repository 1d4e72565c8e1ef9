"""What the other lanes bring to a forward: the `Feed` that the pipeline gives to `Model.launch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from runtime.operator_streams import StreamChoice
from runtime.staging import Prepared
from runtime.streams import Stream

__all__ = ["Arriving", "LaneFeed"]


class Arriving(Protocol):
    """A module on its way to the device (runtime/uploads.py)."""

    def wait(self, layer: int, stream: Stream) -> None: ...
    def done(self) -> bool: ...


@dataclass(slots=True)
class LaneFeed:
    """waiting: a context that shows in the trace for how long compute waits for a lane. kept, ngrams: states, and rows
    of n-grams, that the forward computed and others may want, on their way to host memory. exits: of each sequence,
    where there are any. asked: the groups and the streams of a forward that asked for a number of streams."""

    prepared: Prepared
    arriving: Sequence[Arriving]
    stream: Stream
    waiting: Callable[[str], AbstractContextManager[None]]
    streams: StreamChoice = field(default_factory=StreamChoice)
    kept: Tensor | None = None
    ngrams: Tensor | None = None
    exits: Sequence[int] = ()
    asked: tuple[int, int] | None = None

    def word_rows(self) -> Tensor | None:
        with self.waiting("rows"):
            return self.prepared.word_rows(self.stream)

    def given_rows(self) -> Tensor:
        with self.waiting("rows"):
            return self.prepared.given_rows(self.stream)

    def keep(self, rows: Tensor) -> None:
        self.kept = _to_host(rows)

    def entry_rows(self) -> Tensor | None:
        with self.waiting("rows"):
            return self.prepared.entry_rows(self.stream)

    def keep_ngrams(self, rows: Tensor) -> None:
        """Only those that may be kept."""
        skipped = self.prepared.routes.skipped
        if skipped is None or not skipped.may_keep.any():
            return
        if not skipped.may_keep.all():
            rows = rows.index_select(0, torch.from_numpy(np.flatnonzero(skipped.may_keep)).to(rows.device))
        self.ngrams = _to_host(rows)

    def exited(self, layers: Sequence[int]) -> None:
        self.exits = layers

    def before_layer(self, i: int) -> None:
        if self.arriving:
            with self.waiting("modules"):
                for arrival in self.arriving:
                    arrival.wait(i, self.stream)

    def operator_streams(self, groups: int) -> int:
        num_streams = self.streams.choose(self._num_tokens, groups)
        self.asked = groups, num_streams
        return num_streams

    def took(self, seconds: float) -> None:
        """The forward did. One that waited for modules says nothing of streams."""
        if self.asked is not None and not self.arriving:
            groups, num_streams = self.asked
            self.streams.observe(num_streams, self._num_tokens, groups, seconds)

    @property
    def _num_tokens(self) -> int:
        return len(self.prepared.batch.rows.token_ids)


def _to_host(rows: Tensor) -> Tensor:
    """There when the answers are, which come after it on the same stream."""
    if not rows.is_cuda:
        return rows
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    return host.copy_(rows, non_blocking=True)
