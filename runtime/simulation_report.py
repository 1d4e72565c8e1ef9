"""What a simulated day came to: latencies, who was late, how fair it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.request_log import Offered
from runtime.simulator import Simulated

__all__ = ["fair_shares", "jain", "report"]


def report(
    requests: Sequence[Offered],
    done: Simulated,
    service_s: Callable[[int], float],
    weight: Callable[[str], float] = lambda _: 1.0,
) -> dict[str, Any]:
    """One row. Latencies are of the requests that were answered, in ms; shares are of all requests. p99_with_misses_ms:
    of all, those that got no answer in time having waited for as long as they allowed, None if some allowed for ever.

    weighted_turnaround: latency / service, the mean, service being what the request takes alone (service_s of its
    tokens). late_by_queueing: waited longer than its deadline before it was begun, refused and given up included;
    late: answered after it, or not at all. goodput: tokens a second that were answered in time. jain: see `jain`.
    """
    at_s = np.array([request.at_s for request in requests])
    tokens = np.array([request.tokens for request in requests], np.float64)
    allowed_s = np.array([np.inf if request.deadline_s is None else request.deadline_s for request in requests])
    ok = done.is_ok()
    latency_s, queued_s = done.end_s - at_s, done.begin_s - at_s
    in_time = ok & (latency_s <= allowed_s)
    service = np.array([service_s(int(each)) for each in tokens])
    span_s = max(float(np.nanmax(done.end_s, initial=0.0)) - float(at_s.min(initial=0.0)), 1e-9)
    p50, p95, p99 = np.percentile(latency_s[ok], (50, 95, 99)) if ok.any() else (np.nan,) * 3
    waited_s = np.where(in_time, latency_s, allowed_s)
    asked, got = _by_tenant(requests, tokens), _by_tenant(requests, tokens * in_time)
    return {
        "p50_ms": _ms(p50),
        "p95_ms": _ms(p95),
        "p99_ms": _ms(p99),
        "p99_with_misses_ms": _ms(np.percentile(waited_s, 99)) if np.isfinite(waited_s).all() else None,
        "mean_ms": _ms(latency_s[ok].mean()) if ok.any() else None,
        "weighted_turnaround": _rounded((latency_s[ok] / service[ok]).mean()) if ok.any() else None,
        "answered": _rounded(ok.mean()),
        "late_by_queueing": _rounded(1 - (queued_s <= allowed_s).mean()),
        "late": _rounded(1 - in_time.mean()),
        "goodput": round(float(tokens[in_time].sum()) / span_s, 1),
        "busy": _rounded(done.busy_s / span_s),
        "batches": done.batches,
        "tokens_per_batch": round(done.batch_tokens / max(1, done.batches), 1),
        "loads": done.loads,
        "jain": _rounded(jain(asked, got, weight)),
        "total_s": round(span_s, 3),
    }


def jain(asked: Mapping[str, float], got: Mapping[str, float], weight: Callable[[str], float] = lambda _: 1.0) -> float:
    """Jain's index over tenants of what each got next to its fair share of what all got: 1 when everybody has that.

    The fair share is max-min: nobody gets more than it asked for, what it leaves is shared among the others by weight.
    Source: Jain, Chiu, Hawe 1984.
    """
    shares = fair_shares(asked, sum(got.values()), weight)
    x = np.array([got[tenant] / share for tenant, share in shares.items() if share > 0])
    return float(x.sum() ** 2 / (len(x) * (x**2).sum())) if x.any() else 0.0


def fair_shares(asked: Mapping[str, float], total: float, weight: Callable[[str], float]) -> dict[str, float]:
    """Weighted max-min shares of `total`: the level is raised until it is used up."""
    weights = {tenant: weight(tenant) for tenant in asked}
    order = sorted(asked, key=lambda tenant: asked[tenant] / weights[tenant])
    above = list(accumulate(weights[tenant] for tenant in reversed(order)))[::-1]  # of each and all after it
    left, shares = total, dict[str, float]()
    for tenant, rest in zip(order, above, strict=True):
        shares[tenant] = min(asked[tenant], left * weights[tenant] / rest)
        left -= shares[tenant]
    return shares


def _by_tenant(requests: Sequence[Offered], amounts: NDArray[np.float64]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for request, amount in zip(requests, amounts.tolist(), strict=True):
        sums[request.tenant] = sums.get(request.tenant, 0.0) + amount
    return sums


def _ms(seconds: float) -> float | None:
    return None if np.isnan(seconds) else round(float(seconds) * 1e3, 3)


def _rounded(value: float) -> float:
    return round(float(value), 4)
