"""A batch as it is asked of the lanes, in parts if need be, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock

import numpy as np
from torch import Tensor

from runtime.errors import ComputeFailed
from runtime.request import Way
from vbert.errors import VbertError
from vbert.packing import SequenceInput

__all__ = ["LEAST_WORK", "LEFT", "Computed", "Launch", "Outcome", "is_finite", "joined"]

Outcome = Tensor | VbertError
LEFT = ComputeFailed("nobody waits for this answer any more")  # and so nobody will read this
LEAST_WORK = 0.25  # a batch of which less was computed says nothing of how fast others are


def is_finite(outcome: Outcome) -> bool:
    return isinstance(outcome, Tensor) and bool(np.isfinite(outcome.numpy()).all())


@dataclass(frozen=True, slots=True)
class Launch:
    """One batch as it was asked for. wanted: which sequences still have a caller; None: all have."""

    batch_id: int
    sequences: Sequence[SequenceInput]
    wanted: Callable[[], Iterable[bool]] | None = None

    def keep(self) -> list[bool]:
        return [True] * len(self.sequences) if self.wanted is None else list(self.wanted())

    def part(self, places: Sequence[int]) -> Launch:
        """Of some of its sequences."""
        return replace(self, sequences=[self.sequences[i] for i in places], wanted=partial(self._wanted, places))

    def _wanted(self, places: Sequence[int]) -> list[bool]:
        keep = self.keep()
        return [keep[i] for i in places]


@dataclass(frozen=True, slots=True)
class Computed:
    """outcomes, ways: of every sequence of the launch, what became of it and how it came through. num_tokens: of those
    computed. reran: one tenant at a time. ahead_s: what the lanes did for it that can be done while the batch before it
    computes. out_of_memory: it did not fit. work: the share of it that was computed; the rest was stored."""

    outcomes: list[Outcome]
    ways: list[Way]
    num_tokens: int
    compute_s: float
    num_threads: int
    reran: bool
    ahead_s: float = 0.0
    out_of_memory: bool = False
    work: float = 1.0

    @classmethod
    def joined(cls, parts: Sequence[Computed], places: Sequence[Sequence[int]]) -> Computed:
        """Of a launch that was computed in parts, one after the other. places: of the sequences of each."""
        count = sum(map(len, places))
        outcomes: list[Outcome] = [LEFT] * count
        ways = [Way()] * count
        for part, where in zip(parts, places, strict=True):
            for i, outcome, way in zip(where, part.outcomes, part.ways, strict=True):
                outcomes[i], ways[i] = outcome, way
        num_tokens, compute_s = sum(part.num_tokens for part in parts), sum(part.compute_s for part in parts)
        work = sum(part.work * part.num_tokens for part in parts) / max(1, num_tokens)
        return cls(
            outcomes=outcomes,
            ways=ways,
            num_tokens=num_tokens,
            compute_s=compute_s,
            num_threads=max(part.num_threads for part in parts),
            reran=any(part.reran for part in parts),
            ahead_s=parts[0].ahead_s,
            out_of_memory=any(part.out_of_memory for part in parts),
            work=work if num_tokens else 1.0,
        )


def joined(futures: Sequence[Future[Computed]], places: Sequence[Sequence[int]]) -> Future[Computed]:
    """Of the parts of one launch. places: of the sequences of each."""
    answer: Future[Computed] = Future()
    left, lock = len(futures), Lock()

    def ended(_: Future[Computed]) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left:
                return
        try:
            answer.set_result(Computed.joined([future.result() for future in futures], places))
        except Exception as error:  # a bug of ours: whoever waits is told
            answer.set_exception(error)

    for future in futures:
        future.add_done_callback(ended)
    return answer
