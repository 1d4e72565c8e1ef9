"""The parts of a running engine, wired together once. Starts nothing by itself: runtime/engine.py does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import asdict
from typing import Any

from runtime import request_log
from runtime.clock import Clock
from runtime.config import EngineConfig
from runtime.dispatcher import CANARY, Dispatcher, Terms
from runtime.exit_rules import ExitRules
from runtime.forwards import Forwards
from runtime.health import Health
from runtime.host_tier import HostTier
from runtime.lanes import Lanes
from runtime.launch import LEFT, Computed
from runtime.loop import Pieces, ServingLoop, Tests
from runtime.machine import available_bytes, usable_cores
from runtime.manager import Manager, typical_load_s
from runtime.metrics import Metrics, MetricsSnapshot
from runtime.module_files import ModuleFiles
from runtime.ngram_learner import NgramLearner
from runtime.parts import Parts, host_budget_bytes
from runtime.paths import PathRules, table_files
from runtime.pending import Pending
from runtime.pipeline import Pipeline
from runtime.pressure import MemoryPressure
from runtime.registrar import Registrar
from runtime.request_log import Offered
from runtime.residency import residency_policy
from runtime.scheduler import BatchPolicy
from runtime.selftest import SelfTester
from runtime.sequence_sharing import SequenceSharing
from runtime.tenants import Tenants
from runtime.threads import ThreadChoice
from runtime.through_host import ThroughHost
from runtime.throughput import Throughput
from runtime.uploads import Uploads
from runtime.wait_policy import log_collapse
from runtime.weight_rules import WeightRules
from vbert.errors import SelfTestFailed, VbertError
from vbert.ngram.table import NgramTable
from vbert.selftest import check_outputs

__all__ = ["Core"]

_log = logging.getLogger(__name__)
_READ_AT_ONCE = 2**24  # bytes, some 10 ms


class Core:
    """Made on the event loop. `spawn` starts a task that lives as long as the engine."""

    def __init__(
        self,
        config: EngineConfig,
        parts: Parts,
        lanes: Lanes,
        *,
        clock: Clock,
        policy: BatchPolicy,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self.config, self.parts, self.lanes, self._clock = config, parts, lanes, clock
        self._event = event = asyncio.Event()
        self.metrics = metrics = Metrics()
        threads = ThreadChoice.of_lane(config.compute_threads, usable_cores(), log_collapse)
        throughput = Throughput(parts.cost.forward_s if parts.cost else None)
        self._sharing = SequenceSharing(config.sequence_sharing)
        self._paths = PathRules(config.paths, config.ngram_domains, table_files(config.ngrams))
        self._files = ModuleFiles(parts.store.blob_path)
        self.through = self._through_host(spawn)
        self._forwards = Forwards(
            parts.model,
            parts.device,
            lanes.compute,
            clock=clock,
            threads=threads,
            rows=lanes.rows if "rows" in config.lanes else None,
            results=lanes.results,
            overlapped="compute" in config.lanes,
            source=parts.words,
            stores=parts.stores,
            arriving=lambda tenant: self.through.arriving(tenant) if self.through else None,
            trace=parts.trace,
        )
        pressure = MemoryPressure(config.max_batch_tokens, clock)
        self.pipeline = Pipeline(self._forwards, pressure, clock, metrics, throughput)
        self.dispatcher = Dispatcher(
            config=config,
            tokenizer=parts.tokenizer,
            lane=lanes.tokenizer,
            serves=parts.serves,
            is_ready=lambda digest: self.manager.is_ready(digest),
            rate=lambda: self.pipeline.tokens_per_s(config.max_batch_tokens),
            running_s=lambda: max(0.0, (self.pipeline.busy_until_s or 0.0) - clock.now_s()),
            before=lambda request: policy.before(self.loop.view(), request),
            pressure=lambda: self.pipeline.pressure.refusal,
            wake=event.set,
            record=self._record,
            paths=self._paths,
            exits=ExitRules(config.exit_thresholds),
            weights=WeightRules(config.tenant_weights),
            clock=clock,
            metrics=metrics,
        )
        self_tester = SelfTester(
            backbone=parts.backbone,
            tokenizer=parts.tokenizer,
            dtype=parts.model.dtype,
            store=parts.store,
            lane=lanes.loader,
            replay=self.pipeline.replay,
        )
        self.manager = Manager(
            arena=parts.arena,
            budget_bytes=config.module_budget_bytes,
            files=self._files,
            self_tester=self_tester,
            listener=self.dispatcher,
            lane=lanes.loader,
            spawn=spawn,
            wake=event.set,
            clock=clock,
            metrics=metrics,
            policy=residency_policy(config.residency),
            through=self.through,
            load_cost=parts.cost.upload_s if parts.cost and self.through else self._load_cost(),
        )
        self.loop = ServingLoop(
            policy=policy,
            dispatcher=self.dispatcher,
            manager=self.manager,
            self_tester=self_tester,
            pipeline=self.pipeline,
            event=event,
            clock=clock,
            metrics=metrics,
            scope=self._scope,
            domain=lambda pending: self._paths.domain(pending.served.key.tenant),
            record=self._record_batch,
        )
        self.health = Health(
            ask=self._ask_canary, waiting_since_s=self._waiting_since_s, loop_lag=metrics.loop_lag, clock=clock
        )
        self.tenants = Tenants(
            config=config,
            store=parts.store,
            backbone=parts.backbone,
            arena=parts.arena,
            lanes=lanes,
            reserved=parts.name,
            registrar=Registrar(parts.store, lanes.store),
        )

    def _through_host(self, spawn: Callable[[Coroutine[Any, Any, None]], object]) -> ThroughHost | None:
        """The way to a device; None where modules are read straight into the slots that forwards use."""
        parts, lane = self.parts, self.lanes.loader
        if parts.host_arena is None:
            return None
        uploads = Uploads(parts.device, overlapped="modules" in self.config.lanes, trace=parts.trace)
        host = HostTier(
            arena=parts.host_arena,
            budget_bytes=host_budget_bytes(self.config, parts.model.device),
            files=self._files,
            lane=self.lanes.loader,
            policy=residency_policy(self.config.residency),
            load_cost=self._load_cost(),
        )
        return ThroughHost(host=host, uploads=uploads, device=parts.model.device, lane=lane, spawn=spawn)

    def _idle(self) -> bool:
        return not self.pipeline.in_flight and not self.dispatcher.queue.waiting

    async def learn(self) -> None:
        """Compute n-grams that texts did without, when there is time. Until cancelled."""
        ngrams, local = self.parts.stores.ngrams, self.parts.model.local
        if ngrams is None or local is None:
            return
        learner = NgramLearner(
            ngrams=ngrams,
            local=local,
            device=self.parts.device,
            compute=self.lanes.compute,
            idle=self._idle,
            clock=self._clock,
        )
        await learner.run()

    async def read_tables(self) -> None:
        """Have the n-gram tables in the page cache, the most frequent n-grams first, as far as half of the free memory
        goes: else the first texts after a start read the disk row by row."""
        if (ngrams := self.parts.stores.ngrams) is None or not ngrams.tables:
            return
        left = available_bytes() // 2
        for table in ngrams.tables:
            left -= await self._read(table, left)

    async def _read(self, table: NgramTable, most: int) -> int:
        loop, done = asyncio.get_running_loop(), 0
        try:
            while done < most:
                size = min(_READ_AT_ONCE, most - done)
                count = await loop.run_in_executor(self.lanes.imports, table.read_ahead, done, size)
                if not count:
                    break
                done += count
        except OSError as error:
            _log.warning("%s is not read ahead: %s", table.path, error)
        return done

    def _record(self, pending: Pending, outcome: str) -> None:
        if (recorder := self.parts.recorder) is not None:
            lengths = tuple(len(encoded.token_ids) for encoded in pending.encoded)
            allowed_s = None if pending.deadline_s is None else pending.deadline_s - pending.arrival_s
            request = Offered(pending.arrival_s, pending.served.key.tenant, lengths, allowed_s, pending.priority)
            recorder.add(request, outcome, pending.timings.total_s if outcome == "ok" else None)

    def _record_batch(self, pieces: Pieces, tests: Tests, batch: Computed, launched_s: float) -> None:
        """Those with self-tests or a canary, that were stored in part, or of whom somebody left, tell nothing."""
        recorder, is_canary = self.parts.recorder, any(pending.caller == CANARY for pending, _ in pieces)
        if recorder is None:
            return
        if tests or is_canary or batch.reran or batch.work < 1 or LEFT in batch.outcomes:
            recorder.add_other(self._clock.now_s())
            return
        tenants = len({pending.served.key.digest for pending, _ in pieces})
        times = (launched_s, self._clock.now_s())
        recorder.add_batch(request_log.Computed(batch.num_tokens, len(batch.outcomes), tenants, *times))

    def _scope(self, pending: Pending) -> bytes | None:
        """Canaries and self-tests, which prove that the backbone computes, take no part."""
        if pending.caller == CANARY:
            return None
        store = self.parts.stores.sequences
        return self._sharing.scope(pending.served.key.tenant, (lambda tenant: b"own") if store is None else store.salt)

    def _load_cost(self) -> Callable[[int], float]:
        """Seconds from the disk into host memory by bytes."""
        return self.parts.cost.load_s if self.parts.cost else typical_load_s

    async def prove(self) -> None:
        """The first canary. Raises SelfTestFailed unless it was answered as the dense reference answers."""
        await self.health.canary()
        if self.health.error is not None:
            raise SelfTestFailed(f"the backbone does not answer as it should: {self.health.error}")

    async def look_after(self) -> None:
        """Every few seconds a canary, and away with what nobody uses of tenants that were removed. Until cancelled."""
        while True:
            await self.hold_pinned()
            await asyncio.sleep(self.config.canary_interval_s)
            await self.health.canary()
            await self.collect_garbage()
            if self.parts.recorder is not None:
                self.parts.recorder.flush()

    async def prefetch(self, tenants: Iterable[str]) -> dict[str, bool]:
        """Which of the tenants are in memory now, after those that are not were brought in as far as room is free.

        Raises UnknownTenant.
        """
        digests = {tenant: self.parts.serves(tenant).key.digest for tenant in tenants}
        here = await asyncio.gather(*map(self.manager.prefetch, digests.values()))
        return dict(zip(digests, here, strict=True))

    async def hold_pinned(self) -> None:
        """Hold the active versions of the pinned tenants, as many as half of the budget takes, in the order given."""
        held: dict[str, int] = {}
        for tenant in self.config.pinned_tenants:
            try:
                digest = self.parts.serves(tenant).key.digest
                num_bytes = await self.manager.num_bytes(digest)
            except (VbertError, OSError) as error:
                _log.warning("the pinned tenant %s is not held: %s", tenant, error)
                continue
            if digest in held:
                continue
            if sum(held.values()) + num_bytes > self.config.module_budget_bytes // 2:
                _log.error("pinned tenants from %s on take more than half of module_budget_bytes; raise it", tenant)
                break
            if digest:
                held[digest] = num_bytes
        self.manager.hold(held)

    async def collect_garbage(self) -> None:
        try:
            unused = await self.tenants.collect(lambda: self.dispatcher.live.keys() | set(self.manager.reading))
        except (VbertError, OSError) as error:  # the disk, or another process that writes: the next round tries again
            _log.warning("the files of removed tenants could not be deleted: %s", error)
            return
        for digest in unused:
            self.manager.drop(digest)

    def snapshot(self) -> MetricsSnapshot:
        queue, manager, pipeline = self.dispatcher.queue, self.manager, self.pipeline
        sequences, ngrams = self.parts.stores.sequences, self.parts.stores.ngrams
        return self.metrics.snapshot(
            resident_bytes=manager.bytes_by_kind,
            memory_bytes=self._memory_bytes(),
            sequences=asdict(sequences.counts) if sequences is not None else {},
            ngrams=asdict(ngrams.counters) if ngrams is not None else {},
            resident_modules=len(manager.resident),
            module_budget_bytes=self.config.module_budget_bytes,
            loading_modules=len(manager.loading),
            queue_inputs=queue.num_inputs,
            queue_tokens=queue.num_tokens,
            in_flight_batches=pipeline.in_flight,
            tokens_per_s=pipeline.tokens_per_s(self.config.max_batch_tokens),
        )

    def _memory_bytes(self) -> dict[str, int]:
        """What holds memory. rows: a mapped file, whose pages the system keeps and drops."""
        model, words, through, stores = self.parts.model, self.parts.words, self.through, self.parts.stores
        return {
            "backbone": model.encoder.num_bytes + (0 if model.local is None else model.local.num_bytes),
            "modules": self.manager.bytes_by_kind.total(),
            "host_modules": 0 if through is None else through.host.num_bytes,
            "rows": 0 if words is None else words.table.nbytes,
            "sequences": 0 if stores.sequences is None else stores.sequences.num_bytes,
            "ngrams": 0 if stores.ngrams is None else stores.ngrams.num_bytes,
            "activations": model.activation_bytes,
            "staging": self._forwards.staging_bytes,
        }

    async def _ask_canary(self) -> None:
        """Through the queue and the compute lane like any request; the numbers must be those of the dense reference."""
        canary = self.parts.canary
        path = "compute" if canary.path == "exact" else canary.path  # what is stored proves nothing
        terms = Terms(caller=CANARY, path=path)
        done = await self.dispatcher.submit("embed", self.parts.name, [canary.token_ids.tolist()], terms)
        check_outputs([canary], [output for output in done.outputs if output is not None], self.parts.model.dtype)

    def _waiting_since_s(self) -> float | None:
        """Since when there is work and no batch ended: the later of the oldest request's arrival and the last end."""
        starts = [self.dispatcher.oldest_open_s(), self.pipeline.moved_s if self.pipeline.in_flight else None]
        known = [start for start in starts if start is not None]
        return max(min(known), self.pipeline.moved_s) if known else None
