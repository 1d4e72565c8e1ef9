"""The one loop: asks the policy, applies what it says, waits for an event. It decides nothing by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat

from runtime.clock import Clock
from runtime.dispatcher import Dispatcher
from runtime.launch import LEFT, Computed
from runtime.manager import Manager
from runtime.metrics import Metrics
from runtime.pending import Pending
from runtime.pipeline import Outcome, Pipeline
from runtime.request import Batch, BatchPlan, Slice
from runtime.scheduler import BatchPolicy, View
from runtime.selftest import SelfTester, as_sequences
from vbert.arena import ResidentTenant
from vbert.errors import VbertError
from vbert.model import SequenceInput
from vbert.tenant import SelfTest

__all__ = ["Pieces", "ServingLoop", "Tests"]

Pieces = list[tuple[Pending, Slice]]
Tests = dict[str, tuple[ResidentTenant | None, tuple[SelfTest, ...]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class ServingLoop:
    """`event` is set whenever a request came or left, a batch ended, or a module came, went or failed. scope: who may
    share the lower layers of a request's texts, domain: whose n-grams are asked, both for `SequenceInput`. record:
    told of every batch that ended, and when it was launched."""

    policy: BatchPolicy
    dispatcher: Dispatcher
    manager: Manager
    self_tester: SelfTester
    pipeline: Pipeline
    event: asyncio.Event
    clock: Clock
    metrics: Metrics
    scope: Callable[[Pending], bytes | None] = lambda _: None
    domain: Callable[[Pending], str] = lambda _: ""
    record: Callable[[Pieces, Tests, Computed, float], None] = lambda pieces, tests, batch, launched_s: None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.event.clear()
            plan = self.policy.plan(self.view())
            self._apply(plan)
            if not plan.batches:  # after a launch there may be room for another
                await self._wait(plan.wake_s)

    def view(self) -> View:
        pipeline = self.pipeline
        batch_tokens = pipeline.pressure.batch_tokens
        return View.of(
            self.dispatcher.queue,
            now_s=self.clock.now_s(),
            loading=self.manager.loading,
            in_flight=pipeline.in_flight,
            busy_until_s=pipeline.busy_until_s,
            max_batch_tokens=batch_tokens,
            tokens_per_s=pipeline.tokens_per_s(batch_tokens),
            batch_s=pipeline.batch_s,
            ahead_s=pipeline.ahead_s,
        )

    def _apply(self, plan: BatchPlan) -> None:
        self.dispatcher.expire(plan.expire)
        for batch in plan.batches:
            self._launch(batch)
        for digest in plan.release:
            self.manager.drop(digest)
        for key in plan.prefetch:
            self.manager.load(key.digest)
        self.manager.recheck()

    async def _wait(self, wake_s: float | None) -> None:
        timer = None
        if wake_s is not None:
            delay_s = wake_s - self.clock.now_s()
            timer = asyncio.get_running_loop().call_later(max(0.0, delay_s), self.event.set)
        try:
            await self.event.wait()
        finally:
            if timer is not None:
                timer.cancel()

    def _launch(self, batch: Batch) -> None:
        pieces = [(self.dispatcher.take(piece), piece) for piece in batch.slices]
        sequences: list[SequenceInput] = []
        tests: Tests = {}
        for pending, piece in pieces:
            digest = pending.served.key.digest
            tenant = self.manager.pin(digest)
            inputs = pending.encoded[piece.first : piece.last]
            scope, domain = self.scope(pending), self.domain(pending)
            how = (tenant, scope, pending.may_take, domain, pending.exit_above)
            sequences += [SequenceInput(e.token_ids, e.type_ids, *how) for e in inputs]
            if untested := self.manager.tests(digest):
                tests[digest] = (tenant, untested)
        for tenant, untested in tests.values():
            sequences += as_sequences(untested, tenant)
        finished = partial(self._finished, pieces, tests, self.clock.now_s())
        self.pipeline.launch(sequences, finished, partial(_wanted, pieces, tests))

    def _finished(self, pieces: Pieces, tests: Tests, launched_s: float, batch: Computed) -> None:
        """A batch ended: every piece gets its outputs, or the error of its tenant."""
        now_s, begin, outcomes = self.clock.now_s(), 0, batch.outcomes
        self.record(pieces, tests, batch, launched_s)
        refused = self._judge(tests, outcomes[sum(piece.last - piece.first for _, piece in pieces) :])
        for pending, piece in pieces:
            end = begin + piece.last - piece.first
            digest = pending.served.key.digest
            self.manager.unpin(digest)
            computed = sum(outcome is not LEFT for outcome in outcomes[begin:end])
            for kind in pending.served.kinds:
                self.metrics.computed_inputs[kind] += computed
            if digest in refused:
                self.dispatcher.fail(pending, refused[digest])
            else:
                self._deliver(pending, piece.first, batch, slice(begin, end), now_s)
            begin = end
        self.event.set()

    def _judge(self, tests: Tests, outcomes: Sequence[Outcome]) -> dict[str, VbertError]:
        """Modules whose self-tests failed, each with why; the manager learns of them and of the others."""
        refused, begin = {}, 0
        for digest, (_, untested) in tests.items():
            own, begin = outcomes[begin : begin + len(untested)], begin + len(untested)
            if (error := self.self_tester.verdict(untested, own)) is None:
                self.manager.passed(digest)
            else:
                refused[digest] = error
                self.manager.refuse(digest, error)
        return refused

    def _deliver(self, pending: Pending, first: int, batch: Computed, own: slice, now_s: float) -> None:
        errors = [outcome for outcome in batch.outcomes[own] if isinstance(outcome, VbertError)]
        if errors:
            self.dispatcher.fail(pending, errors[0])
        else:
            outputs = [outcome for outcome in batch.outcomes[own] if not isinstance(outcome, VbertError)]
            pending.deliver(first, outputs, batch.ways[own], compute_s=batch.compute_s, now_s=now_s)


def _wanted(pieces: Pieces, tests: Tests) -> Iterator[bool]:
    """For each input of a batch, whether its caller still waits; self-tests always run. Read by the compute thread."""
    for pending, piece in pieces:
        yield from repeat(not pending.future.done(), piece.last - piece.first)
    for _, untested in tests.values():
        yield from repeat(True, len(untested))
