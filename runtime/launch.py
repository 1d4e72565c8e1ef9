"""A batch as it is asked of the lanes, and what becomes of it. Value objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from runtime.errors import ComputeFailed
from runtime.request import Way
from vbert.errors import VbertError
from vbert.packing import SequenceInput

__all__ = ["LEAST_WORK", "LEFT", "Computed", "Launch", "Outcome"]

Outcome = Tensor | VbertError
LEFT = ComputeFailed("nobody waits for this answer any more")  # and so nobody will read this
LEAST_WORK = 0.25  # a batch of which less was computed says nothing of how fast others are


@dataclass(frozen=True, slots=True)
class Launch:
    """One batch as it was asked for. wanted: which sequences still have a caller; None: all have."""

    batch_id: int
    sequences: Sequence[SequenceInput]
    wanted: Callable[[], Iterable[bool]] | None = None

    def keep(self) -> list[bool]:
        return [True] * len(self.sequences) if self.wanted is None else list(self.wanted())


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
