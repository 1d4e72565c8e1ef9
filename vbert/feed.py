"""`Feed`: what a forward asks for while it runs, where other lanes bring it. Without one it looks up everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Feed"]


class Feed(Protocol):
    """Answers on the thread that runs the forward. On CUDA nothing here blocks it: the compute stream waits instead."""

    def word_rows(self) -> Tensor | None:
        """[T, H] on the model's device and in its dtype, in place of the word-embedding look-up; None: look up.
        For a batch with a junction: of what enters the lowest layer."""
        ...

    def given_rows(self) -> Tensor:
        """[n, H] on the model's device: the states that a junction was promised."""
        ...

    def keep(self, rows: Tensor) -> None:
        """[n, H] on the model's device: the computed states that a junction wants kept. They are the feed's own."""
        ...

    def entry_rows(self) -> Tensor | None:
        """[T, H] float32 on the model's device: what stored n-grams say of the tokens of a batch's entry. It is the
        forward's own. None: those that the entry has."""
        ...

    def keep_ngrams(self, rows: Tensor) -> None:
        """[m, 3, H] on the model's device: rows of the entry's missing n-grams. They are the feed's own."""
        ...

    def exited(self, layers: Sequence[int]) -> None:
        """[B]: before which layer the answer of each sequence left early, in the order they were given; 0: it did not.
        Told of batches in which some may."""
        ...

    def before_layer(self, i: int) -> None:
        """Called before anything reads what tenants change in layer i: -1 embeddings, 0 to L - 1, then L, the heads."""
        ...

    def operator_streams(self, groups: int) -> int:
        """On how many streams of a GPU the operators of so many groups of tenants may run, at most one a group. Asked
        only where that is open: there are several groups, the model has no number, and no graph is replayed."""
        ...
