"""The waiting requests, indexed as policies ask for them: by arrival, deadline, share and tenant module.

Pure data: no futures, no clock, no admission rules. Every method is O(log n) plus a C-level move of at most a few
thousand machine words, so that planning never copies the queue.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from runtime.request import PRIORITIES, Waiting
from runtime.shares import Shares

__all__ = ["WaitingQueue"]

_Deadlines = list[tuple[float, int]]
_Tags = list[tuple[float, int, int]]
_Entry = TypeVar("_Entry", tuple[float, int], tuple[float, int, int])


class WaitingQueue:
    """Request ids ascend with arrival, so a sorted list of ids is the arrival order.

    A request is *ready* while its module is in memory and *cold* while it is not; `arrive` and `leave` move all
    requests of a module. Deadlines are watched from `add` to `forget`, that is until the request is answered.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Waiting] = {}
        self._ready: list[int] = []
        self._ready_of: dict[str, dict[int, None]] = {}
        self._cold: dict[str, dict[int, None]] = {}
        self._deadlines: _Deadlines = []
        self._ready_deadlines: _Deadlines = []
        self._shares = {priority: Shares() for priority in PRIORITIES}
        self._tags: dict[int, tuple[float, int, int]] = {}
        self._ready_tags: dict[str, _Tags] = {priority: [] for priority in PRIORITIES}
        self._inputs_of: Counter[str] = Counter()
        self.num_inputs = 0
        self.num_tokens = 0
        self.ready_tokens = 0

    @property
    def waiting(self) -> Mapping[int, Waiting]:
        """Every request with inputs still to run, by id."""
        return self._waiting

    @property
    def ready(self) -> Sequence[int]:
        """Ids of requests whose module is in memory, in order of arrival."""
        return self._ready

    @property
    def cold(self) -> Mapping[str, Mapping[int, None]]:
        """Ids of requests whose module is not in memory, by digest; the digest that waits longest comes first."""
        return self._cold

    @property
    def deadlines(self) -> Sequence[tuple[float, int]]:
        """(deadline, id) of every request that is not answered yet, the earliest first."""
        return self._deadlines

    @property
    def ready_deadlines(self) -> Sequence[tuple[float, int]]:
        """(deadline, id) of the ready requests, the earliest first."""
        return self._ready_deadlines

    @property
    def shares(self) -> Mapping[str, Sequence[tuple[float, int, int]]]:
        """(tag, id, tokens left) of the ready requests by priority, the lowest tag first."""
        return self._ready_tags

    def tag_of(self, request_id: int) -> float:
        """Of a waiting request."""
        return self._tags[request_id][0]

    def tag(self, request: Waiting) -> float:
        """That the request would get if it came now."""
        return self._shares[request.priority].tag(request.key.tenant)

    def inputs_of(self, caller: str) -> int:
        return self._inputs_of[caller]

    def waits_for(self, digest: str) -> bool:
        """Whether a ready request needs this module."""
        return digest in self._ready_of

    def add(self, request: Waiting, *, ready: bool) -> None:
        self._waiting[request.request_id] = request
        tag = self._shares[request.priority].join(request.key.tenant, request.tokens, request.weight)
        self._tags[request.request_id] = (tag, request.request_id, request.tokens)
        if request.deadline_s is not None:
            insort(self._deadlines, (request.deadline_s, request.request_id))
        self._count(request, +1)
        (self._make_ready if ready else self._make_cold)(request)

    def take(self, request_id: int, count: int) -> None:
        """The first `count` inputs still to run leave for a batch."""
        request = self._waiting[request_id]
        tags = self._ready_tags[request.priority]
        if tags:
            self._shares[request.priority].served(tags[0][0])
        if count == len(request.lengths):
            self._drop(request)
            return
        rest = replace(request, lengths=request.lengths[count:], first=request.first + count)
        tag, _, _ = before = self._tags[request_id]  # what is left comes after what was taken
        self._tags[request_id] = (tag + (request.tokens - rest.tokens) / request.weight, request_id, rest.tokens)
        if tags and request_id in self._ready_of.get(request.key.digest, ()):
            _discard(tags, before)
            insort(tags, self._tags[request_id])
        self._count(request, -1)
        self._count(rest, +1)
        self.ready_tokens += rest.tokens - request.tokens
        self._waiting[request_id] = rest

    def forget(self, request_id: int, deadline_s: float | None) -> None:
        """The request is answered: it waits no longer, and nobody watches its deadline."""
        if (request := self._waiting.get(request_id)) is not None:
            self._shares[request.priority].refund(request.key.tenant, request.tokens, request.weight)
            self._drop(request)
        if deadline_s is not None:
            _discard(self._deadlines, (deadline_s, request_id))

    def arrive(self, digest: str) -> None:
        """The module came into memory."""
        for request_id in self._cold.pop(digest, {}):
            self._make_ready(self._waiting[request_id])

    def leave(self, digest: str) -> None:
        """The module left memory."""
        for request_id in tuple(self._ready_of.get(digest, ())):
            request = self._waiting[request_id]
            self._unmake_ready(request)
            self._make_cold(request)

    def _drop(self, request: Waiting) -> None:
        del self._waiting[request.request_id]
        self._count(request, -1)
        if request.request_id in self._ready_of.get(request.key.digest, ()):
            self._unmake_ready(request)
        else:
            _discard_member(self._cold, request)
        del self._tags[request.request_id]

    def _count(self, request: Waiting, sign: int) -> None:
        self.num_inputs += sign * len(request.lengths)
        self.num_tokens += sign * request.tokens
        self._inputs_of[request.caller] += sign * len(request.lengths)
        if not self._inputs_of[request.caller]:
            del self._inputs_of[request.caller]

    def _make_ready(self, request: Waiting) -> None:
        insort(self._ready, request.request_id)
        if request.deadline_s is not None:
            insort(self._ready_deadlines, (request.deadline_s, request.request_id))
        insort(self._ready_tags[request.priority], self._tags[request.request_id])
        self._ready_of.setdefault(request.key.digest, {})[request.request_id] = None
        self.ready_tokens += request.tokens

    def _unmake_ready(self, request: Waiting) -> None:
        del self._ready[bisect_left(self._ready, request.request_id)]
        if request.deadline_s is not None:
            _discard(self._ready_deadlines, (request.deadline_s, request.request_id))
        _discard(self._ready_tags[request.priority], self._tags[request.request_id])
        _discard_member(self._ready_of, request)
        self.ready_tokens -= request.tokens

    def _make_cold(self, request: Waiting) -> None:
        self._cold.setdefault(request.key.digest, {})[request.request_id] = None


def _discard(ordered: list[_Entry], item: _Entry) -> None:
    idx = bisect_left(ordered, item)
    if idx < len(ordered) and ordered[idx] == item:
        del ordered[idx]


def _discard_member(groups: dict[str, dict[int, None]], request: Waiting) -> None:
    members = groups[request.key.digest]
    del members[request.request_id]
    if not members:
        del groups[request.key.digest]
