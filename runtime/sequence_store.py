"""Hidden states of whole token sequences after the lower layers, kept for those who send the same text again.

What the layers below L compute is the same for every tenant whose lowest delta lies at L or above. Entries are found
by a hash of its token and type ids that is keyed with a secret of the store, and the ids themselves are compared: no
collision, chosen or not, ever gives the states of another text. Rows are kept in the model's dtype, so that an answer
is as near to a computed one as two batches are to each other.

Rows lie one by one in a pool, so entries of any length leave no gaps. What leaves memory may go to a file (`disk`),
which has no name and ends with the process.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.admission import Sketch
from vbert.errors import ConfigError
from vbert.packing import SequenceInput

__all__ = ["Found", "SequenceStore", "StoreCounts"]

ENTRY_BYTES = 400  # of an entry beside its rows: ids, row numbers, hash, and Python's objects for them
_ID_BYTES = 16  # a token: id, type id, row number
_TYPICAL_TOKENS = 16  # for the size of the sketch


@dataclass(slots=True)
class StoreCounts:
    """Since the start. hits, misses: sequences looked up; shared: computed once for several of a batch."""

    hits: int = 0
    misses: int = 0
    shared: int = 0
    disk_hits: int = 0
    inserted: int = 0
    refused: int = 0
    evicted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a store knows of the sequences of a batch, and what it wants to know.

    keys, ids: [B], None and nothing for a sequence that has no part in it. first: [B], the first sequence with the same
    lower layers. given: sequences whose states are stored, ascending. rows: [n, H], their states one after the other.
    wanted: sequences whose states would be kept if they were computed, ascending.
    """

    keys: list[bytes | None]
    ids: list[bytes]
    first: list[int]
    given: list[int]
    rows: Tensor
    wanted: list[int]

    @property
    def changes_nothing(self) -> bool:
        """Whether the batch may as well be computed without the store."""
        return not self.given and not self.wanted and all(first == i for i, first in enumerate(self.first))


class SequenceStore:
    """Any thread may look up, insert and read counts."""

    def __init__(
        self,
        *,
        layer: int,
        width: int,
        dtype: torch.dtype,
        fingerprint: str,
        num_bytes: int,
        disk_bytes: int = 0,
        disk: Path | None = None,
        pin: bool = False,
    ) -> None:
        """States of `width` numbers that enter layer `layer`, in at most `num_bytes` of memory, the sketch and what it
        takes to find entries on disk included, and `disk_bytes` of a file in the folder `disk`. pin: memory from which
        a GPU copies. Raises ConfigError when that is too little, OSError.
        """
        row_bytes = width * dtype.itemsize
        disk_rows = disk_bytes // row_bytes if disk is not None else 0
        sketch = Sketch((num_bytes + disk_bytes) // (_TYPICAL_TOKENS * row_bytes))
        room = num_bytes - sketch.num_bytes - disk_rows * (_ID_BYTES + ENTRY_BYTES // _TYPICAL_TOKENS)
        num_rows = (room - ENTRY_BYTES) // (row_bytes + _ID_BYTES)
        if num_rows < _TYPICAL_TOKENS:
            raise ConfigError(
                f"the sequence store has {num_bytes} bytes of memory, of which {num_bytes - room} serve to find "
                f"entries, and a text takes about {_TYPICAL_TOKENS * (row_bytes + _ID_BYTES) + ENTRY_BYTES}; give it "
                "more, or less disk, or 0 for none"
            )
        self.layer, self.dtype = layer, dtype
        self.counts = StoreCounts()
        memory = torch.empty(num_rows, width, dtype=dtype, pin_memory=pin)
        self._tiers = [_Tier(memory, room, ENTRY_BYTES, _ID_BYTES, sketch)]
        if disk is not None and disk_rows:
            mapped = _mapped_rows(disk, disk_rows, width, dtype)
            self._tiers.append(_Tier(mapped, disk_bytes, 0, 0, sketch, max_entries=disk_rows // _TYPICAL_TOKENS))
        self._index_bytes = num_bytes - room
        self._sketch = sketch
        self._key = secrets.token_bytes(32)
        self._about = f"{fingerprint} {layer} {dtype}".encode()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Of memory that is used, what it takes to find entries included."""
        return self._tiers[0].num_bytes + self._index_bytes

    @property
    def disk_bytes(self) -> int:
        """Of the file that is used."""
        return sum(tier.num_bytes for tier in self._tiers[1:])

    @property
    def num_entries(self) -> int:
        """In memory."""
        return len(self._tiers[0].entries)

    def salt(self, tenant: str) -> bytes:
        """The scope of a tenant that shares with nobody."""
        return hashlib.blake2b(tenant.encode(), digest_size=16, key=self._key).digest()

    def takes(self, sequences: Sequence[SequenceInput]) -> list[bool]:
        """Of which sequences the plain lower layers are those of the bare backbone, and may be kept."""
        tenants = {id(s.tenant): s.tenant for s in sequences if s.scope is not None}
        lowest = {i: None if tenant is None else tenant.header.lowest_layer for i, tenant in tenants.items()}
        fits = {i for i, layer in lowest.items() if layer is None or layer >= self.layer}
        return [s.scope is not None and id(s.tenant) in fits and "plain" in s.paths for s in sequences]

    def find(
        self, sequences: Sequence[SequenceInput], *, skips: Sequence[bool] | None = None, pin: bool = False
    ) -> Found | None:
        """What is known of the sequences of a batch; None: no sequence takes part. skips: [B], which will go another
        way than through the plain lower layers unless they are stored. pin: rows for a copy to a GPU."""
        taking_part = self.takes(sequences)
        if not any(taking_part):
            return None
        ids = [_ids(s) if takes else b"" for s, takes in zip(sequences, taking_part, strict=True)]
        keys = [
            self._hash(i, s.scope) if takes else None for i, s, takes in zip(ids, sequences, taking_part, strict=True)
        ]
        first, given = list(range(len(sequences))), []
        entries: list[tuple[_Tier, _Entry]] = []
        wanted: list[int] = []
        seen: dict[tuple[bytes, bytes | None], int] = {}
        with self._lock:
            for i, key in enumerate(keys):
                if key is None:
                    continue
                self._sketch.add(key)
                if skips is not None and skips[i]:
                    if (entry := self._entry(key, ids[i])) is not None:
                        given.append(i)
                        entries.append(entry)
                    continue
                first[i] = seen.setdefault((ids[i], sequences[i].scope), i)
                if first[i] != i:
                    self.counts.shared += 1
                elif (entry := self._entry(key, ids[i])) is not None:
                    given.append(i)
                    entries.append(entry)
                else:
                    self.counts.misses += 1
                    if any(tier.victims(key, len(sequences[i].token_ids)) is not None for tier in self._tiers):
                        wanted.append(i)
                    else:
                        self.counts.refused += 1
            self.counts.hits += len(given)
            rows = self._gathered(entries, pin)
            self._promote([keys[i] for i in given], entries, rows)
        return Found(keys=keys, ids=ids, first=first, given=given, rows=rows, wanted=wanted)

    def insert(self, found: Found, sequences: Sequence[SequenceInput], rows: Tensor) -> None:
        """Keep computed states: rows [n, H] of the sequences `found.wanted`, one after the other, in host memory."""
        begin = 0
        with self._lock:
            for i in found.wanted:
                end = begin + len(sequences[i].token_ids)
                key = found.keys[i]
                assert key is not None
                if not any(key in tier.entries for tier in self._tiers):  # another batch may have been faster
                    inserted = self._insert(key, found.ids[i], rows[begin:end], self._tiers)
                    self.counts.inserted += inserted
                    self.counts.refused += not inserted
                begin = end

    def forget(self, found: Found) -> None:
        """Drop the entries that gave states to a batch that failed: they may be why."""
        with self._lock:
            for i in found.given:
                key = found.keys[i]
                for tier in self._tiers:
                    if key is not None:
                        tier.drop(key)

    # ---- under the lock --------------------------------------------------------------------------------------------

    def _entry(self, key: bytes, ids: bytes) -> tuple[_Tier, _Entry] | None:
        """The entry of these ids, if they are stored under the key."""
        for tier in self._tiers:
            if (entry := tier.entries.get(key)) is not None and entry.ids == ids:
                tier.entries.move_to_end(key)
                self.counts.disk_hits += tier is not self._tiers[0]
                return tier, entry
        return None

    def _gathered(self, entries: Sequence[tuple[_Tier, _Entry]], pin: bool) -> Tensor:
        width = self._tiers[0].rows.shape[1]
        out = torch.empty(sum(len(entry.rows) for _, entry in entries), width, dtype=self.dtype, pin_memory=pin)
        begin, into = 0, out.view(torch.uint8).numpy()
        for tier, entry in entries:
            end = begin + len(entry.rows)
            np.take(tier.bytes, entry.rows, axis=0, out=into[begin:end], mode="clip")  # "raise" copies through a buffer
            begin = end
        return out

    def _promote(self, keys: Sequence[bytes | None], entries: Sequence[tuple[_Tier, _Entry]], rows: Tensor) -> None:
        """What is asked for more often than the least of memory comes back from disk. rows: [n, H], of all entries."""
        begin = 0
        for key, (tier, entry) in zip(keys, entries, strict=True):
            end = begin + len(entry.rows)
            if key is not None and tier is not self._tiers[0] and key in tier.entries:
                self._insert(key, entry.ids, rows[begin:end], self._tiers[:1])
            begin = end

    def _insert(self, key: bytes, ids: bytes, states: Tensor, tiers: Sequence[_Tier]) -> bool:
        """Into the first tier where it is worth more than what it replaces. Whether there is one."""
        for tier in tiers:
            if (victims := tier.victims(key, len(states))) is None:
                continue
            for lower in self._tiers:
                lower.drop(key)
            for victim in victims:
                self._evict(victim, tier)
            tier.put(key, ids, states)
            return True
        return False

    def _evict(self, key: bytes, tier: _Tier) -> None:
        """An entry of memory goes to disk, if it is worth more there than what it replaces."""
        self.counts.evicted += tier is self._tiers[0]
        entry = tier.entries[key]
        below = self._tiers[1:] if tier is self._tiers[0] else []
        states = tier.read(entry) if below else None
        tier.drop(key)
        if states is not None:
            self._insert(key, entry.ids, states, below)

    def _hash(self, ids: bytes, scope: bytes | None) -> bytes:
        hashed = hashlib.blake2b(self._about, digest_size=16, key=self._key)
        hashed.update(b"\0" + (scope or b"") + b"\0")
        hashed.update(ids)
        return hashed.digest()


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    ids: bytes
    rows: NDArray[np.int64]  # in its tier


class _Tier:
    """Rows [N, H] with an owner or free, and the entries that own them, the longest unused first."""

    def __init__(
        self,
        rows: Tensor,
        max_bytes: int,
        entry_bytes: int,
        id_bytes: int,
        sketch: Sketch,
        *,
        max_entries: int | None = None,
    ) -> None:
        """entry_bytes, id_bytes: what an entry, and each of its tokens, takes of `max_bytes` beside its rows."""
        self.rows, self.used = rows, 0
        self.bytes: NDArray[np.uint8] = rows.view(torch.uint8).numpy()  # the same memory
        self.entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._max_bytes, self._sketch = max_bytes, sketch
        self._entry_bytes = entry_bytes
        self._max_entries = len(rows) if max_entries is None else max_entries
        self._token_bytes = rows.shape[1] * rows.dtype.itemsize + id_bytes
        self._returned: list[NDArray[np.int64]] = []
        self._fresh = 0  # rows from here on were never used: address space only

    @property
    def num_bytes(self) -> int:
        return self.used * self._token_bytes + len(self.entries) * self._entry_bytes

    def read(self, entry: _Entry) -> Tensor:
        """A copy."""
        return self.rows[torch.from_numpy(entry.rows)]

    def victims(self, key: bytes, num_rows: int) -> list[bytes] | None:
        """Entries that make room for a new one; None: they are worth as much as it, or there are too few.

        Worth is how often something is asked for times its bytes, which is what computing it again would take. Of a
        victim that is larger than the newcomer only as much counts.
        """
        need = num_rows * self._token_bytes + self._entry_bytes
        missing = self.num_bytes + need - self._max_bytes
        too_many = len(self.entries) + 1 - self._max_entries
        victims: list[bytes] = []
        worth, wanted = 0, self._sketch.count(key) * need
        for victim, entry in self.entries.items():
            if missing <= 0 and too_many <= 0:
                break
            gives = len(entry.rows) * self._token_bytes + self._entry_bytes
            worth += self._sketch.count(victim) * min(gives, need)
            if worth >= wanted:
                return None
            victims.append(victim)
            missing, too_many = missing - gives, too_many - 1
        return victims if missing <= 0 and too_many <= 0 else None

    def put(self, key: bytes, ids: bytes, states: Tensor) -> None:
        """There is room: bytes enough for another entry always are rows enough."""
        taken = self._take(len(states))
        self.entries[key] = entry = _Entry(ids, taken)
        try:
            self.rows.index_copy_(0, torch.from_numpy(entry.rows), states)
        except BaseException:
            self.drop(key)
            raise

    def drop(self, key: bytes) -> None:
        if (entry := self.entries.pop(key, None)) is not None:
            self._returned.append(entry.rows)
            self.used -= len(entry.rows)

    def _take(self, count: int) -> NDArray[np.int64]:
        parts: list[NDArray[np.int64]] = []
        missing = count
        while missing and self._returned:
            rows = self._returned.pop()
            if len(rows) > missing:
                self._returned.append(rows[missing:])
                rows = rows[:missing]
            parts.append(rows)
            missing -= len(rows)
        parts.append(np.arange(self._fresh, self._fresh + missing))
        self._fresh += missing
        self.used += count
        return np.concatenate(parts)


def _mapped_rows(folder: Path, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """[N, H] in a file without a name, which ends when nobody maps it any more. Raises OSError where there is no room:
    now, since writing to a mapped file that cannot grow would end the process."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, num_rows * width * dtype.itemsize)
        mapped = np.memmap(file, dtype=np.uint8, mode="r+")
    return torch.from_numpy(mapped).view(dtype).view(num_rows, width)


def _ids(sequence: SequenceInput) -> bytes:
    """Token and type ids, in as many bytes as tokens of a kind: no two sequences have the same."""
    return np.array([sequence.token_ids, sequence.type_ids], np.int32).tobytes()
