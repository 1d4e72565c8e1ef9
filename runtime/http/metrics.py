"""The engine's numbers and those of HTTP in Prometheus' text format. No label has a tenant, a key or a path in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from runtime.metrics import SECONDS, STAGES, HistogramSnapshot, MetricsSnapshot

__all__ = ["HttpMetrics"]


class HttpMetrics:
    """One registry a server. `route` is the pattern of the route table, or `unknown`: a bounded set."""

    def __init__(self, snapshot: Callable[[], MetricsSnapshot]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(snapshot))
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "vbert_http_requests",
            "Answers by route and status.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "vbert_http_request_seconds",
            "From the request's head to its answer, before that is written.",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self.in_flight = Gauge("vbert_http_in_flight", "Requests a stop would wait for.", registry=self._registry)

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def render(self) -> tuple[bytes, str]:
        """The text, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _EngineCollector(Collector):
    """Reads one snapshot a scrape, so that its numbers belong to one moment."""

    def __init__(self, snapshot: Callable[[], MetricsSnapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        return ()  # collecting at registration would need a started engine

    def collect(self) -> Iterable[Metric]:
        now = self._snapshot()
        yield from _counters(now)
        yield from _gauges(now)
        yield from _histograms(now)


def _counters(now: MetricsSnapshot) -> Iterable[Metric]:
    requests = CounterMetricFamily("vbert_requests", "Requests by task and outcome.", labels=("task", "outcome"))
    for (task, outcome), count in now.requests.items():
        requests.add_metric((task, outcome), count)
    yield requests
    yield _counter("vbert_inputs", "Inputs answered, by task.", now.inputs, "task")
    yield _counter("vbert_computed_inputs", "Inputs computed, by module kind.", now.computed_inputs, "kind")
    yield _counter("vbert_sequences", "What the sequence store saw and did, by event.", now.sequences, "event")
    yield _counter("vbert_ngrams", "What the n-gram store found and did, by event.", now.ngrams, "event")
    exits = {str(layer): count for layer, count in now.exits.items()}
    yield _counter("vbert_early_exits", "Answers that left before a layer, by its number.", exits, "layer")
    yield _counter("vbert_paths", "Inputs by the way they came through the lower layers.", now.paths, "path")
    yield _counter("vbert_loads", "Modules brought into memory, by outcome.", now.loads, "outcome")
    for name, text, value in (
        ("vbert_tokens", "Tokens answered, special ones included.", now.tokens),
        ("vbert_batches", "Forward passes.", now.batches),
        ("vbert_reruns", "Batches that failed and were run again tenant by tenant.", now.reruns),
        ("vbert_out_of_memory", "Batches that found too little device memory.", now.out_of_memory),
        ("vbert_evictions", "Modules dropped from memory for others.", now.evictions),
        ("vbert_compute_busy_seconds", "Seconds the compute lane was busy.", now.compute_busy_s),
    ):
        yield CounterMetricFamily(name, text, value=value)


def _gauges(now: MetricsSnapshot) -> Iterable[Metric]:
    resident = GaugeMetricFamily("vbert_resident_bytes", "Bytes of modules in memory, by kind.", labels=("kind",))
    for kind, num_bytes in now.resident_bytes.items():
        resident.add_metric((kind,), num_bytes)
    yield resident
    memory = GaugeMetricFamily("vbert_memory_bytes", "Bytes by what holds them.", labels=("part",))
    for part, num_bytes in now.memory_bytes.items():
        memory.add_metric((part,), num_bytes)
    yield memory
    for name, text, value in (
        ("vbert_resident_modules", "Modules in memory.", now.resident_modules),
        ("vbert_module_budget_bytes", "Limit of vbert_resident_bytes.", now.module_budget_bytes),
        ("vbert_loading_modules", "Modules on their way into memory.", now.loading_modules),
        ("vbert_queue_inputs", "Inputs waiting.", now.queue_inputs),
        ("vbert_queue_tokens", "Tokens waiting.", now.queue_tokens),
        ("vbert_in_flight_batches", "Forward passes under way.", now.in_flight_batches),
        ("vbert_compute_threads", "Threads of the last forward pass.", now.compute_threads),
        (
            "vbert_event_loop_lag_p99_seconds",
            "How late the event loop woke up, 99 of 100 times at most; lately.",
            now.loop_lag.p99,
        ),
    ):
        yield GaugeMetricFamily(name, text, value=value)
    if now.tokens_per_s is not None:
        yield GaugeMetricFamily("vbert_tokens_per_second", "Compute rate, measured.", value=now.tokens_per_s)


def _histograms(now: MetricsSnapshot) -> Iterable[Metric]:
    for stage in STAGES:
        text = f"Seconds an answered request spent in {stage}, by the kinds of the tenant's module."
        family = HistogramMetricFamily(f"vbert_request_{stage}_seconds", text, labels=("kind",))
        for (of, kinds), snapshot in now.seconds.items():
            if of == stage:
                family.add_metric((kinds,), _buckets(snapshot), snapshot.total)
        yield family
    for name, text, snapshot in (
        ("vbert_batch_tokens", "Tokens of a forward pass.", now.batch_tokens),
        ("vbert_load_seconds", "Seconds one module took to load.", now.load_s),
        ("vbert_event_loop_lag_seconds", "How late the event loop woke up.", now.loop_lag),
    ):
        yield HistogramMetricFamily(name, text, buckets=_buckets(snapshot), sum_value=snapshot.total)


def _counter(name: str, text: str, values: Mapping[str, int], label: str) -> Metric:
    family = CounterMetricFamily(name, text, labels=(label,))
    for value, count in values.items():
        family.add_metric((value,), count)
    return family


def _buckets(snapshot: HistogramSnapshot) -> list[tuple[str, float]]:
    """Prometheus' buckets are cumulative, the snapshot's are not."""
    bounds = [*map(str, snapshot.bounds), "+Inf"]
    return list(zip(bounds, accumulate(snapshot.counts), strict=True))
