"""Batches in flight, as the event loop sees them: launched in order, told when they end, and what they should take.

With one batch computing and one launched behind it, the lanes never wait for the event loop. What happens to a batch on
them is in runtime/forwards.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import count, islice

from torch import Tensor

from runtime.clock import Clock
from runtime.errors import ComputeFailed
from runtime.forwards import Forwards
from runtime.launch import LEAST_WORK, Computed, Launch, Outcome
from runtime.metrics import Metrics
from runtime.pressure import MemoryPressure
from runtime.request import Way
from runtime.throughput import Throughput
from vbert.errors import VbertError
from vbert.model import SequenceInput

__all__ = ["Outcome", "Pipeline"]

_Replay = tuple[Sequence[SequenceInput], asyncio.Future[list[Tensor]]]
_REPLAYED_AT_ONCE = 16  # modules: short enough for the requests that wait behind
_KEEP = 0.9  # weight of the past in `ahead_s`
_log = logging.getLogger(__name__)


class Pipeline:
    """`launch` from the event loop; `done` is called on it. State is touched by the event loop only."""

    def __init__(
        self,
        forwards: Forwards,
        pressure: MemoryPressure,
        clock: Clock,
        metrics: Metrics,
        throughput: Throughput | None = None,
    ) -> None:
        self.pressure = pressure
        self._forwards, self._clock, self._metrics = forwards, clock, metrics
        self._ids = count()
        self._throughput = throughput or Throughput()
        self._replays: list[_Replay] = []
        self._replaying = False
        self.in_flight = 0
        self.ahead_s = 0.0  # how long before the end of one batch the next should be launched, for no lane to wait
        self._expected_s: deque[float | None] = deque()  # of each batch in flight
        self._busy_until_s: float | None = None
        self._work = 1.0  # that batches did lately, of what they would have without anything stored
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
        """Of batches of that size, doing as much work as the last ones did; None while nothing is known."""
        rate = self._throughput.tokens_per_s(batch_tokens)
        return None if rate is None else rate / self._work

    def batch_s(self, num_tokens: int) -> float | None:
        """Expected seconds of a batch of so many tokens; None while nothing is known."""
        seconds = self._throughput.seconds(num_tokens)
        return None if seconds is None else seconds * self._work

    def launch(
        self,
        sequences: Sequence[SequenceInput],
        done: Callable[[Computed], None],
        wanted: Callable[[], Iterable[bool]] | None = None,
    ) -> None:
        """Compute a batch after those launched before it; then `done(computed)`, its outcomes in the order of
        `sequences`, each the raw output of its head or the error of its tenant.

        `wanted` is asked on the lanes' threads when the batch begins: which sequences still have a caller.
        """
        num_tokens = sum(len(s.token_ids) for s in sequences)
        self._expect(num_tokens)
        if not self.in_flight:
            self._moved_s = self._clock.now_s()
        self.in_flight += 1
        loop = asyncio.get_running_loop()
        finished = partial(self._finished, done, len(sequences))
        future = self._forwards.submit(Launch(next(self._ids), sequences, wanted))
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

    def _replayed(self, together: Sequence[_Replay], computed: Computed) -> None:
        left = iter(computed.outcomes)
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
        self._expected_s.append(self.batch_s(num_tokens))
        start_s = self.busy_until_s if len(self._expected_s) > 1 else self._clock.now_s()
        seconds = self._expected_s[-1]
        self._busy_until_s = None if seconds is None or start_s is None else start_s + seconds

    def _finished(self, done: Callable[[Computed], None], num_sequences: int, future: Future[Computed]) -> None:
        self.in_flight -= 1
        self._moved_s = self._clock.now_s()
        self._expected_s.popleft()  # batches end in the order they were launched; what was foretold wrongly is over
        known = [seconds for seconds in self._expected_s if seconds is not None]
        self._busy_until_s = self._moved_s + sum(known) if len(known) == len(self._expected_s) else None
        if (error := future.exception()) is not None:
            _log.critical("a batch was lost", exc_info=error)
            lost: list[Outcome] = [ComputeFailed(f"the batch was lost ({error!r}); report the log")] * num_sequences
            done(Computed(lost, [Way()] * num_sequences, 0, 0.0, 0, False))
            return
        computed = future.result()
        if computed.num_tokens:
            self._work = _KEEP * self._work + (1 - _KEEP) * computed.work
            if computed.work >= LEAST_WORK:
                self._throughput.observe(computed.num_tokens, computed.compute_s / computed.work)
            self.ahead_s = _KEEP * self.ahead_s + (1 - _KEEP) * computed.ahead_s
        self._metrics.compute_threads = computed.num_threads
        self._metrics.batches += 1
        self._metrics.batch_tokens.observe(computed.num_tokens)
        self._metrics.compute_busy_s += computed.compute_s
        self._metrics.reruns += computed.reran
        self._metrics.out_of_memory += computed.out_of_memory
        self.pressure.observe(computed.num_tokens, computed.out_of_memory)
        done(computed)
