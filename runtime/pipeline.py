"""The compute lane: one named thread that runs batches one after the other. Knows sequences, no requests and no queue.

With one batch computing and one launched behind it, the thread never waits for the event loop. A batch that fails is
run again tenant by tenant, so that what is wrong with one tenant stays its own trouble.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress, groupby, islice

import torch
from torch import Tensor

from runtime.clock import Clock
from runtime.errors import ComputeFailed
from runtime.metrics import Metrics
from runtime.threads import ThreadChoice
from runtime.throughput import Throughput
from vbert.arena import ResidentTenant
from vbert.errors import VbertError
from vbert.model import Model, SequenceInput

__all__ = ["Outcome", "Pipeline"]

Outcome = Tensor | VbertError
_Replay = tuple[Sequence[SequenceInput], asyncio.Future[list[Tensor]]]
_LEFT = ComputeFailed("nobody waits for this answer any more")  # and so nobody will read this
_REPLAYED_AT_ONCE = 16  # modules: short enough for the requests that wait behind
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Computed:
    outcomes: list[Outcome]
    num_tokens: int
    compute_s: float
    num_threads: int
    reran: bool


class Pipeline:
    """`launch` from the event loop; `done` is called on it. State is touched by the event loop only, but for the choice
    of threads, which the compute thread makes and learns."""

    def __init__(self, model: Model, lane: Executor, threads: ThreadChoice, clock: Clock, metrics: Metrics) -> None:
        self._model, self._lane, self._clock, self._metrics = model, lane, clock, metrics
        self._threads = threads
        self._throughput = Throughput()
        self._replays: list[_Replay] = []
        self._replaying = False
        self.in_flight = 0
        self._busy_until_s: float | None = None
        self._moved_s = clock.now_s()  # when a batch last ended, or began on an idle lane

    @property
    def busy_until_s(self) -> float | None:
        """When the batches in flight should end; None when none is, or nothing was measured yet."""
        return self._busy_until_s if self.in_flight else None

    @property
    def moved_s(self) -> float:
        """When the lane last ended a batch, or began one after a pause. Long ago with something in flight: stuck."""
        return self._moved_s

    def tokens_per_s(self, batch_tokens: int) -> float | None:
        return self._throughput.tokens_per_s(batch_tokens)

    def launch(
        self,
        sequences: Sequence[SequenceInput],
        done: Callable[[Sequence[Outcome], float], None],
        wanted: Callable[[], Iterable[bool]] | None = None,
    ) -> None:
        """Compute a batch after those launched before it; then `done(outcomes, compute_s)`, outcomes in the order of
        `sequences`, each the raw output of its head or the error of its tenant.

        `wanted` is asked on the compute thread when the batch begins: which sequences still have a caller.
        """
        num_tokens = sum(len(s.token_ids) for s in sequences)
        self._expect(num_tokens)
        if not self.in_flight:
            self._moved_s = self._clock.now_s()
        self.in_flight += 1
        loop = asyncio.get_running_loop()
        finished = partial(self._finished, done)
        future = self._lane.submit(self._begin, sequences, num_tokens, wanted)
        future.add_done_callback(lambda computed: loop.call_soon_threadsafe(finished, computed))

    async def replay(self, sequences: Sequence[SequenceInput]) -> list[Tensor]:
        """Compute the sequences of one tenant among those of others that are being loaded. Raises ComputeFailed.

        One batch of replays is in flight at a time; those that come meanwhile share the next one, so that a hundred
        cold tenants cost some batches and not a hundred.
        """
        answer: asyncio.Future[list[Tensor]] = asyncio.get_running_loop().create_future()
        self._replays.append((sequences, answer))
        if not self._replaying:
            self._replay_together()
        return await answer

    def _replay_together(self) -> None:
        wanted = [replay for replay in self._replays if not replay[1].done()]  # the others were cancelled
        together, self._replays = wanted[:_REPLAYED_AT_ONCE], wanted[_REPLAYED_AT_ONCE:]
        self._replaying = bool(together)
        if together:
            self.launch([s for sequences, _ in together for s in sequences], partial(self._replayed, together))

    def _replayed(self, together: Sequence[_Replay], outcomes: Sequence[Outcome], _: float) -> None:
        left = iter(outcomes)
        for sequences, answer in together:
            own = list(islice(left, len(sequences)))
            error = next((outcome for outcome in own if isinstance(outcome, VbertError)), None)
            if answer.done():
                continue
            if error:
                answer.set_exception(error)
            else:
                answer.set_result([outcome for outcome in own if isinstance(outcome, Tensor)])
        self._replay_together()

    def _expect(self, num_tokens: int) -> None:
        seconds = self._throughput.seconds(num_tokens)
        start_s = max(self._clock.now_s(), self.busy_until_s or 0.0)
        self._busy_until_s = None if seconds is None else start_s + seconds

    def _finished(self, done: Callable[[Sequence[Outcome], float], None], future: Future[_Computed]) -> None:
        computed = future.result()
        self.in_flight -= 1
        self._moved_s = self._clock.now_s()
        if computed.num_tokens:
            self._throughput.observe(computed.num_tokens, computed.compute_s)
        self._metrics.compute_threads = computed.num_threads
        self._metrics.batches += 1
        self._metrics.batch_tokens.observe(computed.num_tokens)
        self._metrics.compute_busy_s += computed.compute_s
        self._metrics.reruns += computed.reran
        done(computed.outcomes, computed.compute_s)

    # ---- on the compute thread -------------------------------------------------------------------------------------

    def _begin(
        self, sequences: Sequence[SequenceInput], num_tokens: int, wanted: Callable[[], Iterable[bool]] | None
    ) -> _Computed:
        """The batch without the sequences whose callers left while it waited for the one before it."""
        keep = [True] * len(sequences) if wanted is None else list(wanted())
        if all(keep):
            return self._compute(sequences, num_tokens)
        present = list(compress(sequences, keep))
        computed = _Computed([], 0, 0.0, torch.get_num_threads(), False)
        if present:
            computed = self._compute(present, sum(len(s.token_ids) for s in present))
        outcomes = iter(computed.outcomes)
        return replace(computed, outcomes=[next(outcomes) if kept else _LEFT for kept in keep])

    def _compute(self, sequences: Sequence[SequenceInput], num_tokens: int) -> _Computed:
        # Chosen now and not at the launch: the batch before, which may have collapsed, is known.
        num_threads = self._threads.choose(num_tokens)
        started_s = self._clock.now_s()
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        try:
            outcomes: list[Outcome] = list(self._forward(sequences))
        except Exception as error:
            _log.error("a batch of %d sequences failed; trying tenant by tenant", len(sequences), exc_info=error)
            outcomes = []
        reran = not outcomes or not all(map(_is_finite, outcomes))
        if reran:
            groups = groupby(sequences, key=lambda sequence: sequence.tenant)
            outcomes = [outcome for _, group in groups for outcome in self._alone(list(group))]
        compute_s = self._clock.now_s() - started_s
        if not reran:
            self._threads.observe(num_threads, num_tokens, compute_s)
        return _Computed(outcomes, num_tokens, compute_s, num_threads, reran)

    def _alone(self, sequences: list[SequenceInput]) -> list[Outcome]:
        """The sequences of one tenant, whose errors concern nobody else."""
        try:
            outputs = self._forward(sequences)
        except Exception as error:
            _log.error("a batch of one tenant failed", exc_info=error)
            return [ComputeFailed(f"the forward pass of this tenant failed: {error}")] * len(sequences)
        broken = ComputeFailed("the tenant gave numbers that are not finite for this input; look at its training")
        return [output if _is_finite(output) else broken for output in outputs]

    def _forward(self, sequences: Sequence[SequenceInput]) -> list[Tensor]:
        batch = self._model.pack(
            sequences
        )  # here, not on the loop: about 1 ms, and what it raises is a batch's failure
        _check_owned(batch.tenants)
        outputs = self._model.forward(batch)
        _check_owned(batch.tenants)
        return outputs


def _check_owned(tenants: Iterable[ResidentTenant]) -> None:
    """The last line against the worst bug: no answer leaves that was computed with another tenant's module."""
    for tenant in tenants:
        if not tenant.owned():
            raise ComputeFailed(
                f"the slots of {tenant.digest[:12]} changed hands while in use; this is a bug, report it"
            )


def _is_finite(outcome: Outcome) -> bool:
    return isinstance(outcome, Tensor) and bool(outcome.isfinite().all())
