"""Cut a pool of queries of several tenants into batches: by number, by the cost of the forward (alpha), by that of the
modules (beta), by both in turn, or by both together.

A *mini-batch* has queries of one tenant, padded to its longest; a *macro-batch* has mini-batches that go through one
forward, padded to the longest of all. alpha: what the shared part of a forward costs; beta: what the modules of one
tenant add for its rows. Only `Joint` adds them up, and needs both in one unit.

Source: Zhou et al. 2022, PetS (USENIX ATC), coordinated batching: Fixed, AlphaOnly, BetaOnly and Coordinated; the joint
objective is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vbert.errors import ConfigError

__all__ = [
    "POOL_POLICIES",
    "AlphaOnly",
    "BetaOnly",
    "Coordinated",
    "Fixed",
    "Joint",
    "MacroBatch",
    "MiniBatch",
    "PoolCosts",
    "PoolPolicy",
    "Query",
    "alpha_of",
    "beta_of",
    "padding_of",
]

Curve = NDArray[np.float64]


class PoolCosts(Protocol):
    """By number of queries, from 0 (which costs nothing) up; inf: more than fit, or were measured, and so for more than
    the curve has. Longer queries never cost less."""

    def alpha(self, length: int) -> Curve: ...
    def beta(self, kind: str, length: int) -> Curve: ...


@dataclass(frozen=True, slots=True)
class Query:
    tenant: str
    kind: str
    length: int


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """queries: places in the pool, of one tenant. length: of the longest."""

    tenant: str
    kind: str
    queries: tuple[int, ...]
    length: int


@dataclass(frozen=True, slots=True)
class MacroBatch:
    """parts: at most one mini-batch of a tenant, but for Coordinated, whose mini-batches stay apart."""

    parts: tuple[MiniBatch, ...]

    @property
    def length(self) -> int:
        return max(part.length for part in self.parts)

    @property
    def size(self) -> int:
        return sum(len(part.queries) for part in self.parts)


class PoolPolicy(Protocol):
    def cut(self, pool: Sequence[Query], costs: PoolCosts) -> list[MacroBatch]:
        """Every query is in one batch of what is returned. Raises ConfigError where one alone costs inf."""


# ---- the policies --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fixed:
    """So many at a time as they came, the last batch being what is left."""

    size: int = 32

    def cut(self, pool: Sequence[Query], costs: PoolCosts) -> list[MacroBatch]:
        return [
            _merged(pool, range(begin, min(len(pool), begin + self.size))) for begin in range(0, len(pool), self.size)
        ]


@dataclass(frozen=True, slots=True)
class AlphaOnly:
    """The least sum of alpha, whosever queries they are."""

    def cut(self, pool: Sequence[Query], costs: PoolCosts) -> list[MacroBatch]:
        order = sorted(range(len(pool)), key=lambda i: pool[i].length)
        ends = _cut_by_alpha([1] * len(order), [pool[i].length for i in order], costs)
        return [_merged(pool, order[begin:end]) for begin, end in ends]


@dataclass(frozen=True, slots=True)
class BetaOnly:
    """The least sum of beta: one launch for each mini-batch."""

    def cut(self, pool: Sequence[Query], costs: PoolCosts) -> list[MacroBatch]:
        return [MacroBatch((part,)) for part in _mini_batches(pool, costs)]


@dataclass(frozen=True, slots=True)
class Coordinated:
    """First mini-batches with the least sum of beta, then macro-batches of them with the least sum of alpha."""

    def cut(self, pool: Sequence[Query], costs: PoolCosts) -> list[MacroBatch]:
        parts = sorted(_mini_batches(pool, costs), key=lambda part: part.length)
        ends = _cut_by_alpha([len(part.queries) for part in parts], [part.length for part in parts], costs)
        return [MacroBatch(tuple(parts[begin:end])) for begin, end in ends]


@dataclass(frozen=True, slots=True)
class Joint:
    """The least sum of alpha and beta, in one unit, of all ways to cut the queries by length; or that of one of the
    others where it is less, which does not keep to that order."""

    def cut(self, pool: Sequence[Query], costs: PoolCosts) -> list[MacroBatch]:
        found = [self._by_length(pool, costs), *(policy.cut(pool, costs) for policy in (AlphaOnly(), Coordinated()))]
        return min(found, key=lambda batches: alpha_of(batches, costs) + beta_of(batches, costs))

    def _by_length(self, pool: Sequence[Query], costs: PoolCosts) -> list[MacroBatch]:
        order = sorted(range(len(pool)), key=lambda i: pool[i].length)
        best, before = np.zeros(len(order) + 1), np.zeros(len(order) + 1, np.int64)
        for end in range(1, len(order) + 1):
            longest = pool[order[end - 1]].length
            alpha, beta = costs.alpha(longest), 0.0
            counts: dict[str, int] = {}
            best[end] = np.inf
            for begin in range(end - 1, max(-1, end - len(alpha)), -1):
                query = pool[order[begin]]
                curve, count = costs.beta(query.kind, longest), counts.get(query.tenant, 0)
                counts[query.tenant] = count + 1
                if count + 1 >= len(curve) or not np.isfinite(curve[count + 1]):
                    break
                beta += curve[count + 1] - curve[count]
                if (total := best[begin] + alpha[end - begin] + beta) <= best[end]:  # the smallest split of equals
                    best[end], before[end] = total, begin
            _check(best[end], 1, longest)
        return [_merged(pool, order[begin:end]) for begin, end in _ends(before)]


POOL_POLICIES: dict[str, PoolPolicy] = {
    "fixed": Fixed(),
    "alpha-only": AlphaOnly(),
    "beta-only": BetaOnly(),
    "coordinated": Coordinated(),
    "joint": Joint(),
}


# ---- what they cost ------------------------------------------------------------------------------------------------


def alpha_of(batches: Sequence[MacroBatch], costs: PoolCosts) -> float:
    """Of all forwards."""
    return sum(_at(costs.alpha(batch.length), batch.size) for batch in batches)


def beta_of(batches: Sequence[MacroBatch], costs: PoolCosts, *, padded: bool = True) -> float:
    """Of all modules. padded: their rows are as long as the macro-batch is, else as their own mini-batch."""
    every = [(part, batch.length if padded else part.length) for batch in batches for part in batch.parts]
    return sum(_at(costs.beta(part.kind, length), len(part.queries)) for part, length in every)


def padding_of(batches: Sequence[MacroBatch], pool: Sequence[Query]) -> float:
    """Tokens computed for each one that was asked for."""
    return sum(batch.size * batch.length for batch in batches) / max(1, sum(query.length for query in pool))


# ---- cutting -------------------------------------------------------------------------------------------------------


def _mini_batches(pool: Sequence[Query], costs: PoolCosts) -> list[MiniBatch]:
    """By tenant, as they came: f(j) = min over k <= j of f(k - 1) + beta(j - k + 1, l_j), its queries by length."""
    tenants: dict[str, list[int]] = {}
    for i, query in enumerate(pool):
        tenants.setdefault(query.tenant, []).append(i)
    found = []
    for mine in tenants.values():
        order = sorted(mine, key=lambda i: pool[i].length)
        lengths = [pool[i].length for i in order]
        curves = [costs.beta(pool[order[0]].kind, length) for length in lengths]
        ends = _cut([1] * len(order), lengths, curves)
        found += [_mini_batch(pool, order[begin:end]) for begin, end in ends]
    return found


def _cut_by_alpha(sizes: Sequence[int], lengths: Sequence[int], costs: PoolCosts) -> list[tuple[int, int]]:
    """g(i) = min over j <= i of g(j - 1) + alpha(P_i - P_(j - 1), L_i), P being sums of the sizes."""
    return _cut(sizes, lengths, [costs.alpha(length) for length in lengths])


def _cut(sizes: Sequence[int], lengths: Sequence[int], curves: Sequence[Curve]) -> list[tuple[int, int]]:
    """Where to cut a row of things so that the curves of the last ones, at the sums of the sizes, add up to least. Of
    equals the smallest split. Raises ConfigError."""
    sums = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    best, before = np.zeros(len(sizes) + 1), np.zeros(len(sizes) + 1, np.int64)
    for end in range(1, len(sizes) + 1):
        curve = curves[end - 1]
        first = int(np.searchsorted(sums, sums[end] - len(curve) + 1))
        total = best[first:end] + curve[sums[end] - sums[first:end]] if first < end else np.array([np.inf])
        before[end] = first + int(np.argmin(total))
        best[end] = total.min()
        _check(best[end], sizes[end - 1], lengths[end - 1])
    return _ends(before)


def _ends(before: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Back along the splits that were best."""
    found, end = [], len(before) - 1
    while end > 0:
        found.append((int(before[end]), end))
        end = int(before[end])
    return found[::-1]


def _check(cost: float, size: int, length: int) -> None:
    if not np.isfinite(cost):
        raise ConfigError(f"the cost of a batch of {size}, {length} tokens long, is not known; measure larger ones")


def _merged(pool: Sequence[Query], queries: Sequence[int]) -> MacroBatch:
    """With the queries of one tenant side by side, tenants in the order of their first one."""
    tenants: dict[str, list[int]] = {}
    for i in queries:
        tenants.setdefault(pool[i].tenant, []).append(i)
    return MacroBatch(tuple(_mini_batch(pool, mine) for mine in tenants.values()))


def _mini_batch(pool: Sequence[Query], queries: Sequence[int]) -> MiniBatch:
    first = pool[queries[0]]
    return MiniBatch(first.tenant, first.kind, tuple(queries), max(pool[i].length for i in queries))


def _at(curve: Curve, size: int) -> float:
    return float(curve[size]) if size < len(curve) else float("inf")
