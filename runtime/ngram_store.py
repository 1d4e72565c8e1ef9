"""Which n-grams of a batch are stored, and by which path each of its sequences goes on from there.

Stored are those of tables (files, the tables of a domain before the general one) and those that were computed before
and came again (a cache in memory). The path of a sequence follows from its own n-grams and what its tenant may use,
never from the others of its batch:

- *exact*: whole n-grams, looked up or computed; when nothing is missing it costs next to nothing;
- *backoff*: nothing is computed: a missing n-gram is replaced by its right bi-gram, its centre, or nothing; chosen only
  where each token has something, and not too much is shortened;
- *compute*: as exact, and nothing is looked up; *plain*: all lower layers, as without a skip part.

Rows that other local layers made (adapted to a domain) are not what `exact` would compute: tenants that learnt it do
not see them, those that can only back off do.

What backoff did without, or plain was chosen for, and is missing a second time, is wanted: it is computed beside a
large batch, when nothing else is, or now and then (runtime/ngram_learner.py), and kept for later texts.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vbert.entry import Entry, Tokens, ngrams_of
from vbert.ngram.cache import NgramCache
from vbert.ngram.index import Keys, Located, Rows, shortened
from vbert.ngram.table import NgramTable
from vbert.packing import SequenceInput
from vbert.skip import SLOTS, Skip

__all__ = ["NgramCounters", "NgramStore", "PathCosts", "Routed", "Skipped"]

_MOST_WANTED, _MOST_NOTED = 2**16, 1024  # n-grams, some 100 bytes each, and texts
_SURE = 0.8  # of a cost that is to be saved: what is looked up has to be merged, and costs are estimates
_TOKENS_PER_WANTED = 64  # of a batch beside which one is computed: 3 rows of local layers on 64 of all layers


class _Source(Protocol):
    """A table or the cache."""

    def fill(self, located: Located, asking: NDArray[np.bool_], length: int, source: int) -> None: ...
    def add_views(self, rows: Rows, cu_seqlens: NDArray[np.int64], out: Tensor) -> None: ...


@dataclass(slots=True)
class NgramCounters:
    """Since the start. trigrams, bigrams, unigrams, nothing: tokens of sequences that skipped, by what was found.
    computed: n-grams; inserted, evicted: of the cache."""

    trigrams: int = 0
    bigrams: int = 0
    unigrams: int = 0
    nothing: int = 0
    computed: int = 0
    inserted: int = 0
    evicted: int = 0


@dataclass(frozen=True, slots=True)
class PathCosts:
    """Seconds, of a sequence alone and at the margin of a large batch. plain: of tokens; local: of missing n-grams."""

    plain_alone: Callable[[int], float]
    plain_margin: Callable[[int], float]
    local_alone: Callable[[int], float]
    local_margin: Callable[[int], float]

    def exact_pays(self, tokens: int, missing: int) -> bool:
        """Whether computing so many n-grams is surely cheaper than the plain lower layers of so many tokens."""
        if not missing:
            return True
        alone = self.local_alone(missing) < _SURE * self.plain_alone(tokens)
        return alone and self.local_margin(missing) < _SURE * self.plain_margin(tokens)


@dataclass(frozen=True, slots=True)
class Skipped:
    """The sequences of a batch that skip, ascending, and what enters for them. may_keep: [m] whether each missing
    n-gram may go to the cache."""

    indices: list[int]
    entry: Entry
    may_keep: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Routed:
    """paths: [B], what each sequence takes: one of its own. The rest is about candidates, those that may skip: which
    they are, whether each shares the cache, whether it would have had use for the n-grams that are not there, their
    types, and where the n-grams around their tokens are."""

    paths: list[str]
    candidates: list[int]
    shares: list[bool]
    misses: list[bool]
    type_ids: list[Sequence[int]]
    sources: Sequence[_Source]
    located: Located

    def missed(self, leave_out: Sequence[int] = ()) -> list[Keys]:
        """N-grams that would have been of use to the candidates but for those left out, and may go to the cache."""
        begins, out = self.located.cu_seqlens, set(leave_out)
        mine = [
            slice(begins[n], begins[n + 1]) for n, i in enumerate(self.candidates) if self.misses[n] and i not in out
        ]
        return [self.located.keys[here][self.located.kept[here] < SLOTS] for here in mine]


class NgramStore:
    """Any thread may do anything; between `route` and `skip` hold `lock`."""

    def __init__(
        self,
        skip: Skip,
        width: int,
        *,
        tables: Mapping[str, Sequence[NgramTable]],
        cache_bytes: int,
        costs: PathCosts,
        most_shortened: float = 1.0,
    ) -> None:
        """tables: by domain, those asked first at the front; the domain "" holds what is asked for all. most_shortened:
        part of a text's n-grams that `auto` may replace by shorter ones. Raises ConfigError for a cache that holds
        nothing."""
        self.config, self._width, self._most_shortened = skip.config, width, most_shortened
        self._exact_pays = lru_cache(maxsize=1 << 14)(costs.exact_pays)  # texts of so many tokens come again
        self._cache = NgramCache(cache_bytes, width) if cache_bytes else None
        self.tables = [table for every in tables.values() for table in every]
        self._foreign = {id(table) for table in self.tables if table.encoder != skip.fingerprint}
        last: list[_Source] = list(tables.get("", ()))
        self._tables = {domain: [*own, *last] for domain, own in tables.items() if domain} | {"": last}
        self._missed: list[Keys] = []  # of texts since somebody last asked what is wanted
        self._wanted: dict[int, None] = {}  # the longest first
        self.counters = NgramCounters()
        self.lock = threading.RLock()

    @property
    def num_bytes(self) -> int:
        """Of the cache. Tables are mapped files, whose pages the system keeps and drops."""
        return 0 if self._cache is None else self._cache.num_bytes

    def route(self, sequences: Sequence[SequenceInput]) -> Routed | None:
        """Choose the path of each sequence; None: all are plain."""
        candidates = [i for i, s in enumerate(sequences) if s.paths != ("plain",)]
        if not candidates:
            return None
        located = Located.unknown(*ngrams_of([sequences[i].token_ids for i in candidates], self.config))
        routed = Routed(
            paths=["plain"] * len(sequences),
            candidates=candidates,
            shares=[sequences[i].scope == b"" for i in candidates],
            misses=[False] * len(candidates),
            type_ids=[sequences[i].type_ids for i in candidates],
            sources=self._all_sources(sequences, candidates),
            located=located,
        )
        paths = [sequences[i].paths for i in candidates]
        self._look_up(routed, sequences, [("exact" in each) | ("backoff" in each) for each in paths], SLOTS)
        shortens = any("backoff" in each for each in paths)
        if shortens:
            absent = np.add.reduceat(located.kept < SLOTS, located.cu_seqlens[:-1]) / np.diff(located.cu_seqlens)
            may = (absent <= self._most_shortened).tolist()
            # Shorter n-grams are of use where not too much is absent, or where a tenant has nothing else.
            backs_off = ["backoff" in each and (few or len(each) == 1) for each, few in zip(paths, may, strict=True)]
            for length in (2, 1) if any(backs_off) else ():
                self._look_up(routed, sequences, backs_off, length)
        for n, i in enumerate(candidates):
            here = slice(located.cu_seqlens[n], located.cu_seqlens[n + 1])
            routed.paths[i] = path = self._path(paths[n], located.keys[here], located.kept[here])
            if shortens and path != "backoff":  # shorter n-grams are of no use to it
                in_part = located.kept[here] < SLOTS
                located.kept[here][in_part], located.source[here][in_part] = 0, -1
            if self._cache is not None and routed.shares[n]:
                # exact is cheaper than plain where it is possible, once its n-grams are there
                routed.misses[n] = path == "backoff" or (path == "plain" and "exact" in paths[n])
        return routed

    def skip(self, routed: Routed, leave_out: Sequence[int] = (), *, pin: bool = False) -> Skipped | None:
        """What enters for the candidates that do not go the plain way, but for those left out; None: there are none.
        pin: rows for a copy to a GPU."""
        out, located = set(leave_out), routed.located
        chosen = [n for n, i in enumerate(routed.candidates) if routed.paths[i] != "plain" and i not in out]
        if not chosen:
            return None
        lengths = np.diff(located.cu_seqlens)
        mine: slice | NDArray[np.bool_] = slice(None)
        if len(chosen) < len(lengths):
            mine = np.repeat(np.isin(np.arange(len(lengths)), chosen), lengths)
            lengths = lengths[chosen]
        tokens = Tokens.at(
            located.keys[mine],
            np.concatenate([[0], np.cumsum(lengths)]),
            [routed.type_ids[n] for n in chosen],
            self.config,
        )
        source, row, kept = located.source[mine], located.row[mine], located.kept[mine]
        paths, shared = [routed.paths[routed.candidates[n]] for n in chosen], [routed.shares[n] for n in chosen]
        flags = [(path != "backoff", share, path == "shortened") for path, share in zip(paths, shared, strict=True)]
        computes, shares, short = np.repeat(np.array(flags), lengths, axis=0).T
        keys = tokens.keys
        if "shortened" in paths:
            keys = shortened(keys, np.where(short, SLOTS - tokens.positions % SLOTS, SLOTS))
        rows = torch.zeros(len(tokens), self._width, pin_memory=pin) if (source >= 0).any() else None
        for number, each in enumerate(routed.sources):
            if (here := source == number).any() and rows is not None:
                each.add_views(np.where(here, row, -1), tokens.cu_seqlens, rows)
        to_compute = computes & (source < 0)
        missing, may_keep, which = keys[:0], np.zeros(0, np.bool_), np.full(len(tokens), -1)
        if to_compute.any():
            missing, which[to_compute] = np.unique(keys[to_compute], return_inverse=True)
            may_keep = np.zeros(len(missing), np.bool_)
        if self._cache is not None:
            stores = shares & np.repeat([path == "exact" for path in paths], lengths)
            may_keep[which[stores & to_compute]] = True
            if len(beside := self.wanted(len(tokens) // _TOKENS_PER_WANTED)):
                beside = np.setdiff1d(beside, missing)
                missing = np.concatenate([missing, beside])
                may_keep = np.concatenate([may_keep, np.ones(len(beside), np.bool_)])
        self._count(kept, computes, len(missing))
        return Skipped(
            [routed.candidates[n] for n in chosen],
            Entry(replace(tokens, keys=keys), rows, missing, which),
            may_keep,
        )

    def insert(self, skipped: Skipped, rows: Tensor) -> None:
        """Keep those of the computed n-grams that came before. rows: [n, 3, H], host memory, of those that may be."""
        if self._cache is None or not len(rows):
            return
        keys = skipped.entry.missing[skipped.may_keep]
        with self.lock:
            again = self._cache.worth_keeping(keys)
            inserted, evicted = self._cache.insert(keys[again], rows[torch.from_numpy(np.flatnonzero(again))])
            self.counters.inserted += inserted
            self.counters.evicted += evicted

    def note(self, missed: Sequence[Keys]) -> None:
        """N-grams that texts did without, an array a text. Nothing is done about them here, since the next text waits;
        of very many texts, those that came first are forgotten."""
        if self._cache is not None:
            with self.lock:
                self._missed = [*self._missed, *missed][-_MOST_NOTED:]

    @property
    def may_want(self) -> bool:
        """False: nothing is wanted."""
        return bool(self._wanted or self._missed)

    def wanted(self, count: int) -> Keys:
        """At most so many n-grams that it would be good to have, each given out once: those that more than one text did
        without. Of more than some ten thousand, those that came first are forgotten."""
        if not count:
            return np.empty(0, np.uint64)
        with self.lock:
            if self._missed:
                self._want(self._missed)
                self._missed = []
            taken = list(itertools.islice(self._wanted, count))
            for key in taken:
                del self._wanted[key]
        return np.array(taken, np.uint64)

    def _want(self, missed: Sequence[Keys]) -> None:
        assert self._cache is not None
        keys, texts = np.concatenate(missed), np.repeat(np.arange(len(missed)), [len(keys) for keys in missed])
        order = np.lexsort((texts, keys))
        keys, texts = keys[order], texts[order]
        once = np.append(True, (np.diff(texts) != 0) | (keys[1:] != keys[:-1]))  # in each text
        keys, counts = np.unique(keys[once[: len(keys)]], return_counts=True)
        absent = self._cache.find(keys) < 0  # but for those that were computed since
        keys, counts = keys[absent], counts[absent]
        self._wanted |= dict.fromkeys(keys[self._cache.worth_keeping(keys) | (counts > 1)].tolist())
        for key in list(itertools.islice(self._wanted, max(0, len(self._wanted) - _MOST_WANTED))):
            del self._wanted[key]

    def keep(self, keys: Keys, rows: Tensor) -> None:
        """Rows [n, 3, H] of wanted n-grams, in host memory."""
        if self._cache is not None:
            with self.lock:
                inserted, evicted = self._cache.insert(keys, rows)
                self.counters.computed += len(keys)
                self.counters.inserted += inserted
                self.counters.evicted += evicted

    def forget(self, skipped: Skipped) -> None:
        """Drop kept n-grams that a batch was given: it failed, and they may be why."""
        if self._cache is not None:
            with self.lock:
                self._cache.discard(skipped.entry.tokens.keys)

    # ---- under the lock ----------------------------------------------------------------------------------------------

    def _all_sources(self, sequences: Sequence[SequenceInput], candidates: Sequence[int]) -> list[_Source]:
        """Those of every domain of the batch, each once."""
        found: dict[int, _Source] = {}
        for ask in dict.fromkeys(_asking(sequences[i]) for i in candidates):
            found |= {id(source): source for source in self._sources_of(*ask)}
        return list(found.values())

    def _sources_of(self, domain: str, shares: bool, only_backs_off: bool) -> list[_Source]:
        cache = [] if self._cache is None or not shares else [self._cache]
        tables = self._tables.get(domain, self._tables[""])
        return [*(table for table in tables if only_backs_off or id(table) not in self._foreign), *cache]

    def _look_up(self, routed: Routed, sequences: Sequence[SequenceInput], asks: Sequence[bool], length: int) -> None:
        """n-grams of so many tokens, for those of the candidates that ask, where nothing was found yet."""
        asking = [_asking(sequences[i]) if asks[n] else None for n, i in enumerate(routed.candidates)]
        for ask in dict.fromkeys(asking):
            if ask is not None:
                mine = np.array([each == ask for each in asking])
                for source in self._sources_of(*ask):
                    number = next(n for n, each in enumerate(routed.sources) if each is source)
                    source.fill(routed.located, mine, length, number)

    def _path(self, allowed: tuple[str, ...], keys: Keys, kept: NDArray[np.int8]) -> str:
        """The cheapest of the paths allowed. keys, kept: of one sequence."""
        if len(allowed) == 1:
            return allowed[0]
        absent = np.flatnonzero(kept < SLOTS)
        if "exact" in allowed and not len(absent):
            return "exact"
        if "backoff" in allowed and len(absent) / len(kept) <= self._most_shortened and kept.all():
            return "backoff"
        missing = len(set(keys[absent].tolist()))
        if "exact" in allowed and ("plain" not in allowed or self._exact_pays(len(keys), missing)):
            return "exact"
        return "plain" if "plain" in allowed else "backoff"

    def _count(self, kept: NDArray[np.int8], computes: NDArray[np.bool_], computed: int) -> None:
        found = np.bincount(kept, minlength=SLOTS + 1)
        self.counters.trigrams += int(found[3])
        self.counters.bigrams += int(found[2])
        self.counters.unigrams += int(found[1])
        self.counters.nothing += int(((kept == 0) & ~computes).sum())
        self.counters.computed += computed


def _asking(sequence: SequenceInput) -> tuple[str, bool, bool]:
    """Whose tables are asked, whether the cache is, and whether rows that other local layers made will do."""
    learnt = sequence.paths if sequence.tenant is None else sequence.tenant.header.paths
    return sequence.domain, sequence.scope == b"", "backoff" in sequence.paths and "exact" not in learnt
