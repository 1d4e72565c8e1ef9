"""Counters and histograms as plain numbers, read as one snapshot. Knows no tenant by name and no Prometheus."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.request import Timings

__all__ = ["SECONDS", "STAGES", "Histogram", "HistogramSnapshot", "Metrics", "MetricsSnapshot"]

STAGES = ("tokenize", "queue", "load", "compute", "total")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKENS = (16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)
_RECENT = 2048  # observations that the quantiles look back on


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramSnapshot:
    """`counts[i]` observations were <= bounds[i] and above the bound before; the last count is above all bounds.

    p50, p99: of the most recent observations (at most 2,048), 0.0 without any.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    count: int
    total: float
    p50: float
    p99: float


class Histogram:
    """Observations of one quantity in fixed buckets, with exact quantiles of the `recent` last ones."""

    def __init__(self, bounds: tuple[float, ...], *, recent: int = _RECENT) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._recent: deque[float] = deque(maxlen=recent)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value
        self._recent.append(value)

    def snapshot(self) -> HistogramSnapshot:
        recent = sorted(self._recent)
        return HistogramSnapshot(
            bounds=self._bounds,
            counts=tuple(self._counts),
            count=sum(self._counts),
            total=self._total,
            p50=_quantile(recent, 0.50),
            p99=_quantile(recent, 0.99),
        )


def _quantile(ordered: list[float], share: float) -> float:
    """The nearest-rank quantile of an ascending list."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSnapshot:
    """Everything the engine counts, at one moment. Counters never fall; gauges are marked.

    requests: by (task, outcome), outcome being `ok`, `cancelled` or the code of the error.
    seconds: by (stage, kinds): tokenize, queue, load, compute or total; the tenant's module kinds joined by +, so that
        their number is bounded whatever the number of tenants is; one observation a request.
    computed_inputs: by module kind (low_rank, ..., head_only, backbone); with two kinds an input
        counts in both.
    loads: by outcome, `ok` or the code of the error. resident_bytes (gauge): by module kind, exact.
    """

    requests: Mapping[tuple[str, str], int]
    inputs: Mapping[str, int]
    tokens: int
    seconds: Mapping[tuple[str, str], HistogramSnapshot]
    batches: int
    batch_tokens: HistogramSnapshot
    compute_busy_s: float
    reruns: int  # batches that failed and were run again tenant by tenant
    out_of_memory: int  # those of them that found too little device memory
    computed_inputs: Mapping[str, int]
    loads: Mapping[str, int]
    load_s: HistogramSnapshot
    evictions: int
    loop_lag: HistogramSnapshot
    resident_bytes: Mapping[str, int]  # gauge, like all below
    memory_bytes: Mapping[str, int]  # by what holds them, such as backbone or modules
    sequences: Mapping[str, int]  # counts of the sequence store, by what happened; empty without one
    ngrams: Mapping[str, int]  # the same of the n-gram store
    paths: Mapping[str, int]  # inputs by the way they came through the lower layers
    exits: Mapping[int, int]  # answers that left early, by the layer before which they did
    resident_modules: int
    module_budget_bytes: int
    loading_modules: int
    queue_inputs: int
    queue_tokens: int
    in_flight_batches: int
    tokens_per_s: float | None
    compute_threads: int = 0  # of the last batch


@dataclass(slots=True)
class Metrics:
    """The live counters; each is written by one part of the engine, all on the event loop."""

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    inputs: Counter[str] = field(default_factory=Counter)
    paths: Counter[str] = field(default_factory=Counter)
    exits: Counter[int] = field(default_factory=Counter)
    tokens: int = 0
    seconds: dict[tuple[str, str], Histogram] = field(default_factory=dict)
    batches: int = 0
    batch_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    compute_busy_s: float = 0.0
    compute_threads: int = 0
    reruns: int = 0
    out_of_memory: int = 0
    computed_inputs: Counter[str] = field(default_factory=Counter)
    loads: Counter[str] = field(default_factory=Counter)
    load_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    evictions: int = 0
    loop_lag: Histogram = field(default_factory=lambda: Histogram(SECONDS))

    def observe_request(self, kinds: tuple[str, ...], timings: Timings) -> None:
        """The split of one answered request's time."""
        named = "+".join(kinds)
        if ("total", named) not in self.seconds:
            # Without recent observations: there are many of these, and sorting all of them would hold the event loop.
            self.seconds.update({(stage, named): Histogram(SECONDS, recent=0) for stage in STAGES})
        for stage in STAGES:
            self.seconds[stage, named].observe(getattr(timings, f"{stage}_s"))

    def snapshot(
        self,
        *,
        resident_bytes: Mapping[str, int],
        memory_bytes: Mapping[str, int],
        sequences: Mapping[str, int],
        ngrams: Mapping[str, int],
        resident_modules: int,
        module_budget_bytes: int,
        loading_modules: int,
        queue_inputs: int,
        queue_tokens: int,
        in_flight_batches: int,
        tokens_per_s: float | None,
    ) -> MetricsSnapshot:
        return MetricsSnapshot(
            requests=dict(self.requests),
            inputs=dict(self.inputs),
            tokens=self.tokens,
            seconds={key: histogram.snapshot() for key, histogram in self.seconds.items()},
            batches=self.batches,
            batch_tokens=self.batch_tokens.snapshot(),
            compute_busy_s=self.compute_busy_s,
            reruns=self.reruns,
            out_of_memory=self.out_of_memory,
            computed_inputs=dict(self.computed_inputs),
            loads=dict(self.loads),
            load_s=self.load_s.snapshot(),
            evictions=self.evictions,
            loop_lag=self.loop_lag.snapshot(),
            resident_bytes=dict(resident_bytes),
            memory_bytes=dict(memory_bytes),
            sequences=dict(sequences),
            ngrams=dict(ngrams),
            paths=dict(self.paths),
            exits=dict(self.exits),
            resident_modules=resident_modules,
            module_budget_bytes=module_budget_bytes,
            loading_modules=loading_modules,
            queue_inputs=queue_inputs,
            queue_tokens=queue_tokens,
            in_flight_batches=in_flight_batches,
            tokens_per_s=tokens_per_s,
            compute_threads=self.compute_threads,
        )
