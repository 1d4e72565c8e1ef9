"""What the other lanes bring to a forward: the `Feed` that the pipeline gives to `Model.launch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from runtime.staging import Prepared
from runtime.streams import Stream

__all__ = ["Arriving", "LaneFeed"]


class Arriving(Protocol):
    """A module on its way to the device (runtime/uploads.py)."""

    def wait(self, layer: int, stream: Stream) -> None: ...
    def done(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class LaneFeed:
    """waiting: a context that shows in the trace for how long compute waits for a lane."""

    prepared: Prepared
    arriving: Sequence[Arriving]
    stream: Stream
    waiting: Callable[[str], AbstractContextManager[None]]

    def word_rows(self) -> Tensor | None:
        with self.waiting("rows"):
            return self.prepared.word_rows(self.stream)

    def before_layer(self, i: int) -> None:
        if self.arriving:
            with self.waiting("modules"):
                for arrival in self.arriving:
                    arrival.wait(i, self.stream)
