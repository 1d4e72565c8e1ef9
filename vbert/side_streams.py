"""Operators that touch different rows, side by side: on streams of a GPU beside the one that a forward runs on.

Events keep the order, on the device: nothing here waits, and a CUDA graph that is being captured captures it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["SideStreams", "Work"]

Work = Callable[[], None]
_cuda: Any = torch.cuda  # its classes are not typed


class SideStreams:
    """Those of one model, made when they are first used. Used by one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._streams = device, list[Any]()

    def __call__(self, works: Sequence[Work]) -> None:
        """Issue each of the works on a stream of its own, the first on the current one. They begin after what was
        issued to the current stream before, and what is issued there from now on comes after all of them.

        So whatever they use was made on the current stream and is freed there later, which needs no `record_stream`.
        """
        current = _cuda.current_stream(self._device)
        ready, begun = current.record_event(), []
        try:
            for stream, work in zip(self._first(len(works) - 1), works[1:], strict=True):
                stream.wait_event(ready)
                begun.append(stream)
                with _cuda.stream(stream):
                    work()
            works[0]()
        finally:  # also where one raises: the memory of what was issued must not go to others before it has ended
            for stream in begun:
                current.wait_event(stream.record_event())

    def _first(self, count: int) -> Sequence[Any]:
        while len(self._streams) < count:
            # Of high priority because nobody else has those: torch gives out the same 32 in turn, and what a lane
            # copies on a stream that is shared with one of these would end in the graph that is captured here.
            self._streams.append(_cuda.Stream(self._device, priority=-1))
        return self._streams[:count]
