"""Cutting a pool into batches while requests come: what is ready when a time window ends is cut at once.

Source: Zhou et al. 2022 (PetS) cut one pool that is there from the start; the window and the deadlines are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from runtime.cost import CostModel
from runtime.policies.pools import Curve, MacroBatch, PoolCosts, PoolPolicy, Query
from runtime.policies.token_budget import expired, prefetched, wake_s
from runtime.request import Batch, BatchPlan, Slice, Waiting
from runtime.scheduler import View

__all__ = ["Pooled", "ProfileCosts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """All batches of a pool in one plan, the one with the earliest request first; the next pool when they are about to
    end.

    A pool is what is ready, as it came, up to max_pool inputs. It is cut when it is full, when its oldest request
    waited for window_s, or when the earliest deadline leaves no more time than the pool takes. Inputs of one request
    keep their order, and a batch that would exceed the token budget leaves some of its inputs for the next pool.
    """

    policy: PoolPolicy
    costs: PoolCosts
    window_s: float = 0.02
    max_pool: int = 128
    max_loading: int = 16
    lead_s: float = 0.002

    def plan(self, view: View) -> BatchPlan:
        expire = tuple(expired(view))
        cut_s = self._cut_s(view)
        return BatchPlan(
            batches=self._batches(view) if cut_s <= view.now_s else (),
            prefetch=prefetched(view, self.max_loading),
            expire=expire,
            wake_s=wake_s(view, len(expire), cut_s),
        )

    def before(self, view: View, request: Waiting) -> int:
        return view.ready_tokens

    def _cut_s(self, view: View) -> float:
        """When the next pool should be cut; infinite: not before the next event."""
        if not view.ready or view.in_flight > 1:
            return math.inf
        oldest = view.waiting[view.ready[0]]
        cut_s = oldest.arrival_s + self.window_s
        if sum(len(view.waiting[i].lengths) for i in islice(view.ready, self.max_pool)) >= self.max_pool:
            cut_s = view.now_s
        elif view.ready_deadlines:
            cut_s = min(cut_s, view.ready_deadlines[0][0] - 2 * (view.batch_s(view.ready_tokens) or 0.0))
        busy_s = -math.inf if not view.in_flight else (view.busy_until_s or view.now_s) - view.ahead_s - self.lead_s
        return max(view.now_s, cut_s, busy_s)

    def _batches(self, view: View) -> tuple[Batch, ...]:
        pool: list[tuple[int, Query]] = []
        for i in view.ready:
            request = view.waiting[i]
            if request.deadline_s is None or request.deadline_s > view.now_s:
                lengths = request.lengths[: self.max_pool - len(pool)]
                pool += [(i, Query(request.key.digest, request.kind, length)) for length in lengths]
            if len(pool) >= self.max_pool:
                break
        if not pool:
            return ()
        cut = self.policy.cut([query for _, query in pool], self.costs)
        taken: dict[int, int] = {}
        slices = [self._slices(view, [pool[q][0] for q in _queries(each)], taken) for each in sorted(cut, key=_first)]
        return tuple(Batch(each) for each in slices if each)

    def _slices(self, view: View, requests: Sequence[int], taken: dict[int, int]) -> tuple[Slice, ...]:
        """One input of each request for each time it is named, as far as the budget goes. taken: by batches before."""
        counts: dict[int, int] = {}
        room = view.max_batch_tokens
        for i in requests:
            request = view.waiting[i]
            done = taken.get(i, 0) + counts.get(i, 0)
            if request.lengths[done] > room and counts:
                continue
            counts[i] = counts.get(i, 0) + 1
            room -= request.lengths[done]
        tenants: dict[str, list[Slice]] = {}
        for i, count in counts.items():
            first = view.waiting[i].first + taken.get(i, 0)
            tenants.setdefault(view.waiting[i].key.digest, []).append(Slice(i, first, first + count))
            taken[i] = taken.get(i, 0) + count
        return tuple(piece for pieces in tenants.values() for piece in pieces)


def _queries(batch: MacroBatch) -> list[int]:
    return [query for part in batch.parts for query in part.queries]


def _first(batch: MacroBatch) -> int:
    return min(_queries(batch))


@dataclass(frozen=True, slots=True)
class ProfileCosts:
    """What a profile says, in seconds. A kind is KIND, or KIND/SIZE with the size of `CostModel.module_s`; one that the
    profile does not know costs nothing more."""

    cost: CostModel
    max_tokens: int
    max_queries: int = 512
    _alphas: dict[int, Curve] = field(default_factory=dict)
    _betas: dict[tuple[str, int], Curve] = field(default_factory=dict)

    def alpha(self, length: int) -> Curve:
        if length not in self._alphas:
            counts = range(1, self._most(length) + 1)
            self._alphas[length] = np.array([0.0, *(self.cost.forward_s(n * length, length) for n in counts)])
        return self._alphas[length]

    def beta(self, kind: str, length: int) -> Curve:
        if (kind, length) not in self._betas:
            name, _, size = kind.partition("/")
            sizes = {"size": int(size)} if size else {}
            counts = range(1, self._most(length) + 1)
            is_known = name in self.cost.module_kinds
            seconds = (self.cost.module_s(name, n * length, **sizes) if is_known else 0.0 for n in counts)
            self._betas[kind, length] = np.array([0.0, *seconds])
        return self._betas[kind, length]

    def _most(self, length: int) -> int:
        return max(1, min(self.max_queries, self.max_tokens // max(1, length)))
