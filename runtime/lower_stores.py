"""The two stores of what lower layers give, asked as one: how does each sequence come to the upper layers?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from torch import Tensor

from runtime.ngram_store import NgramStore, Skipped
from runtime.sequence_store import Found, SequenceStore
from vbert.ngram.index import Keys
from vbert.packing import SequenceInput, Ways

__all__ = ["LowerStores", "Routes", "without_stores"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Routes:
    """What the stores said of a batch; nothing, where none was asked. paths: [B], what each sequence takes, `stored` or
    one of its own; None: all plain. missed: n-grams that would have been of use."""

    found: Found | None = None
    skipped: Skipped | None = None
    paths: Sequence[str] | None = None
    missed: Sequence[Keys] = ()

    def path(self, i: int) -> str:
        return "plain" if self.paths is None else self.paths[i]

    @property
    def changes_nothing(self) -> bool:
        """Whether the batch may as well be computed without the stores."""
        return self.skipped is None and (self.found is None or self.found.changes_nothing)


@dataclass(frozen=True, slots=True)
class LowerStores:
    """sequences: states of whole texts (runtime/sequence_store.py). ngrams: rows of n-grams (runtime/ngram_store.py).
    With both, what both give enters the same layer."""

    sequences: SequenceStore | None = None
    ngrams: NgramStore | None = None

    @property
    def keep_something(self) -> bool:
        return self.sequences is not None or self.ngrams is not None

    def routes(self, sequences: Sequence[SequenceInput], *, pin: bool) -> Routes:
        """A sequence that is stored whole needs no n-grams. pin: rows for a copy to a GPU."""
        store, ngrams = self.sequences, self.ngrams
        with ngrams.lock if ngrams is not None else nullcontext():
            routed = None if ngrams is None else ngrams.route(sequences)
            paths = ["plain"] * len(sequences) if routed is None else list(routed.paths)
            skips = [path != "plain" for path in paths]
            found = None if store is None else store.find(sequences, skips=skips, pin=pin)
            given = [] if found is None else found.given
            skipped = None if routed is None or ngrams is None else ngrams.skip(routed, given, pin=pin)
        stored = {*given}
        for i, first in enumerate([] if found is None else found.first):  # or the same text as one that is
            if first in stored:
                paths[i] = "stored"
        return Routes(found, skipped, paths, () if routed is None else routed.missed(given))

    def ways(self, routes: Routes, count: int) -> Ways:
        """For a batch of `count` sequences, of whose routes something is changed."""
        found, skipped = routes.found, routes.skipped
        layer = self.sequences.layer if self.sequences is not None else None
        if layer is None:
            assert self.ngrams is not None
            layer = self.ngrams.config.first_layer
        return Ways(
            layer=layer,
            first=range(count) if found is None else found.first,
            shares=[False] * count if found is None else [key is not None for key in found.keys],
            given=() if found is None else found.given,
            skipping=() if skipped is None else skipped.indices,
            entry=None if skipped is None else skipped.entry,
            wanted=() if found is None else found.wanted,
        )

    def remember(
        self, routes: Routes, sequences: Sequence[SequenceInput], states: Tensor | None, ngrams: Tensor | None
    ) -> None:
        """Keep what a forward computed: states of the sequences wanted, rows of missing n-grams; in host memory. And
        take note of the n-grams that it missed."""
        if self.sequences is not None and routes.found is not None and states is not None:
            self.sequences.insert(routes.found, sequences, states)
        if self.ngrams is not None and routes.skipped is not None and ngrams is not None:
            self.ngrams.insert(routes.skipped, ngrams)
        if self.ngrams is not None and routes.missed:
            self.ngrams.note(routes.missed)

    def forget(self, routes: Routes) -> None:
        """Drop what was given to a batch that failed, and was answered without it: it may be why."""
        if routes.skipped is not None and routes.skipped.entry.rows is not None:
            _log.warning("a batch failed with stored n-grams and not without; see `vbert ngrams check`")
        if self.sequences is not None and routes.found is not None:
            self.sequences.forget(routes.found)
        if self.ngrams is not None and routes.skipped is not None:
            self.ngrams.forget(routes.skipped)


def without_stores(sequence: SequenceInput) -> SequenceInput:
    """The same with nothing that was stored before, but for tables where its tenant can only back off."""
    if "plain" in sequence.paths:
        path = "plain"
    else:
        path = "compute" if {"exact", "compute"} & {*sequence.paths} else sequence.paths[0]
    return replace(sequence, scope=None, paths=(path,))
