"""What happens to one batch on the threads of the lanes: rows, compute, results. Knows sequences, no event loop.

Batches pass every lane in the order they came. A batch that fails is run again tenant by tenant, so that what is wrong
with one tenant stays its own trouble.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import compress, groupby

import torch
from torch import Tensor

from runtime.clock import Clock
from runtime.errors import ComputeFailed
from runtime.lane_feed import Arriving, LaneFeed
from runtime.launch import LEAST_WORK, LEFT, Computed, Launch, Outcome, is_finite, joined
from runtime.lower_stores import LowerStores, without_stores
from runtime.operator_streams import StreamChoice
from runtime.pressure import is_out_of_memory
from runtime.request import Way
from runtime.staging import Prepared, Preparer, Ring
from runtime.streams import Device, Event
from runtime.threads import ThreadChoice
from runtime.trace import Trace
from vbert.arena import ResidentTenant
from vbert.model import Model, SequenceInput
from vbert.packing import by_weights
from vbert.rows import RowSource

__all__ = ["Forwards"]

_IN_RING = 2  # the batch that computes and the one that is prepared meanwhile
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Early:
    """What the rows thread did for a launch: the sequences it kept, and the batch if it kept any."""

    keep: list[bool]
    prepared: Prepared | None


@dataclass(frozen=True, slots=True)
class _Finish:
    """answers: waits for them. remember: then keeps what the forward computed that others may want. forget: after a
    failure, drops what it was given. took: is told its seconds. ways: of every sequence. work: as `Computed` has it."""

    answers: Callable[[], list[Tensor]]
    remember: Callable[[], None]
    forget: Callable[[], None]
    took: Callable[[float], None]
    ways: list[Way]
    work: float


@dataclass(slots=True, kw_only=True)
class _Running:
    """A batch that was issued. finish: waits for its answers; None: it could not be issued."""

    launch: Launch
    keep: list[bool]
    sequences: list[SequenceInput]
    num_tokens: int
    num_threads: int
    started_s: float
    issued_s: float
    prepared: Prepared | None
    begin: Event
    end: Event
    finish: _Finish | None
    answer: Future[Computed]
    out_of_memory: bool = False


def _none_arriving(_: ResidentTenant) -> Arriving | None:
    return None


class Forwards:
    """Every forward of an engine. The compute thread issues all of them, and does the work of a lane that is off."""

    def __init__(
        self,
        model: Model,
        device: Device,
        compute: Executor,
        *,
        clock: Clock,
        threads: ThreadChoice,
        rows: Executor | None = None,
        results: Executor | None = None,
        overlapped: bool = True,
        source: RowSource | None = None,
        stores: LowerStores | None = None,
        arriving: Callable[[ResidentTenant], Arriving | None] = _none_arriving,
        trace: Trace | None = None,
    ) -> None:
        """compute, rows, results: one thread each; results is for a device that runs ahead. overlapped: whether
        anything of a batch happens before the one before it has ended. source: of word rows. stores: of what
        lower layers give."""
        self._model, self._device, self._clock, self._threads = model, device, clock, threads
        self._compute, self._rows, self._overlapped = compute, rows, overlapped
        self._results = results if device.runs_ahead and overlapped else None
        self._arriving, self._trace, self._streams = arriving, trace, StreamChoice()
        self.ring = Ring(device, _IN_RING)
        self._stores = stores or LowerStores()
        self._ahead = Preparer(model, source, self.ring, device, device.stream("rows"), self._stores)
        self._own_ring = Ring(device, 1)
        self._inline = Preparer(model, source, self._own_ring, device, device.compute, self._stores)

    @property
    def staging_bytes(self) -> int:
        return self.ring.num_bytes + self._own_ring.num_bytes

    def submit(self, launch: Launch) -> Future[Computed]:
        """Compute a batch after those submitted before it, in parts where tenants have weights of their own. Only a bug
        of ours makes the future raise."""
        groups = by_weights(launch.sequences)
        if len(groups) == 1:
            return self._submit(launch)
        return joined([self._submit(launch.part(places)) for places in groups], groups)

    def _submit(self, launch: Launch) -> Future[Computed]:
        answer: Future[Computed] = Future()

        def issue(early: Future[_Early] | None) -> None:
            with _told(answer):
                self._compute.submit(self._run, launch, early, answer)

        if self._rows and self._overlapped:  # the compute thread is not woken before there is something to compute
            self._rows.submit(self._prepare, launch).add_done_callback(issue)
        else:
            issue(None)
        return answer

    # ---- on the rows thread ------------------------------------------------------------------------------------------

    def _prepare(self, launch: Launch) -> _Early:
        keep = launch.keep()
        sequences = list(compress(launch.sequences, keep))
        return _Early(keep, self._ahead(sequences) if sequences else None)

    # ---- on the compute thread ---------------------------------------------------------------------------------------

    def _run(self, launch: Launch, early: Future[_Early] | None, answer: Future[Computed]) -> None:
        with _told(answer):
            running = self._issue(launch, early, answer)
            if running is None:
                count = len(launch.sequences)
                answer.set_result(Computed([LEFT] * count, [Way()] * count, 0, 0.0, torch.get_num_threads(), False))
            elif self._results is None:
                self._settle(running)
            else:
                self._results.submit(self._settle, running)

    def _issue(self, launch: Launch, early: Future[_Early] | None, answer: Future[Computed]) -> _Running | None:
        """Issue the forward of those that still have a caller; None: nobody has."""
        stream, finish, out_of_memory = self._device.compute, None, False
        if early is None and self._rows is not None:
            early = self._rows.submit(self._prepare, launch)
        prepared, error, keep = self._received(launch, early)
        sequences = list(compress(launch.sequences, keep))
        if not sequences:
            return None
        num_tokens = sum(len(s.token_ids) for s in sequences)
        num_threads = self._use_threads(num_tokens)
        started_s, begin = self._clock.now_s(), stream.record()
        try:
            if error is not None:
                raise error
            finish = self._launch(prepared or self._inline(sequences), sequences, launch.batch_id)
        except Exception as failure:
            out_of_memory = _failed(failure, len(sequences))
        return _Running(
            launch=launch,
            keep=keep,
            sequences=sequences,
            num_tokens=num_tokens,
            num_threads=num_threads,
            started_s=started_s,
            issued_s=self._clock.now_s(),
            prepared=prepared,
            begin=begin,
            end=stream.record(),
            finish=finish,
            answer=answer,
            out_of_memory=out_of_memory,
        )

    def _received(
        self, launch: Launch, future: Future[_Early] | None
    ) -> tuple[Prepared | None, Exception | None, list[bool]]:
        """What the rows thread prepared, if it still is what callers wait for, or what went wrong there."""
        early, error = None, None
        try:
            with self._waiting("rows"):
                early = None if future is None else future.result()
        except Exception as failure:
            error = failure
        with ExitStack() as undo:
            if early is not None and early.prepared is not None:
                undo.callback(early.prepared.drop, self._device.compute)
            keep = launch.keep()  # asked again: a batch may have waited for long
            if early is not None and early.keep == keep:
                undo.pop_all()
                return early.prepared, None, keep
        return None, error, keep

    def _use_threads(self, num_tokens: int) -> int:
        """Chosen now and not at the launch: the batch before, which may have collapsed, is known."""
        if self._device.runs_ahead:
            return torch.get_num_threads()
        num_threads = self._threads.choose(num_tokens)
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        return num_threads

    def _launch(self, prepared: Prepared, sequences: Sequence[SequenceInput], batch_id: int) -> _Finish:
        tenants, stream = prepared.batch.tenants, self._device.compute
        with prepared.read_by(stream), stream.current():
            _check_owned(tenants)
            arriving = [a for tenant in tenants if (a := self._arriving(tenant)) is not None and not a.done()]
            feed = LaneFeed(prepared, arriving, stream, self._waiting, self._streams)
            finish = self._model.launch(prepared.batch, feed)
        if self._trace is not None:
            num_tokens = len(prepared.batch.rows.token_ids)
            self._trace.span("rows", prepared.begin, prepared.end, f"batch {batch_id}", tokens=num_tokens)

        def answers() -> list[Tensor]:
            outputs = finish()
            _check_owned(tenants)
            return outputs

        def remember() -> None:
            self._stores.remember(prepared.routes, sequences, feed.kept, feed.ngrams)

        def forget() -> None:
            self._stores.forget(prepared.routes)

        local = self._model.local
        local_layers = 0 if local is None else local.config.local_layers
        work = prepared.batch.work(self._model.config.num_layers, local_layers, feed.exits)
        exits = feed.exits or [0] * len(sequences)
        ways = [Way(prepared.routes.path(i), layer) for i, layer in enumerate(exits)]
        return _Finish(answers, remember, forget, feed.took, ways, work)

    @contextmanager
    def _waiting(self, lane: str) -> Iterator[None]:
        """Compute waits for another lane inside the block; the trace shows for how long."""
        begin = self._device.compute.record() if self._trace is not None else None
        yield
        if self._trace is not None and begin is not None:
            self._trace.span("compute", begin, self._device.compute.record(), f"wait for {lane}")

    # ---- on the results thread, else on the compute thread -----------------------------------------------------------

    def _settle(self, running: _Running) -> None:
        """Wait for the answers of a batch, and give them out if there is nothing wrong with any."""
        with _told(running.answer):
            outcomes = self._collected(running)
            if outcomes and all(map(is_finite, outcomes)):
                compute_s = running.end.since_s(running.begin)
                assert running.finish is not None  # it gave the outcomes
                work, ways = running.finish.work, running.finish.ways
                if work >= LEAST_WORK and self._device.runs_ahead:
                    running.finish.took(compute_s / work)
                elif work >= LEAST_WORK:
                    self._threads.observe(running.num_threads, running.num_tokens, compute_s / work)
                self._tell(running, outcomes, ways, compute_s, self._ahead_s(running), work=work)
                self._remember_aside(running)
            elif self._results is None:
                self._rerun(running)
            else:
                self._compute.submit(self._rerun, running)

    def _collected(self, running: _Running) -> list[Outcome]:
        """Empty where the batch failed."""
        if running.finish is None:
            return []
        begin = self._trace.now() if self._trace is not None else None
        try:
            outcomes: list[Outcome] = list(running.finish.answers())
            running.end.synchronize()
        except Exception as error:
            running.out_of_memory = _failed(error, len(running.keep))
            return []
        if self._trace is not None and begin is not None:
            name, tenants = f"batch {running.launch.batch_id}", len({s.tenant for s in running.sequences})
            self._trace.span("compute", running.begin, running.end, name, tokens=running.num_tokens, tenants=tenants)
            self._trace.span("results", begin, self._trace.now(), name, sequences=len(outcomes))
            self._trace.flush()
        return outcomes

    def _remember_aside(self, running: _Running) -> None:
        """After the answers are out, and on the rows thread: compute waits for nobody who reads or writes a disk."""
        if running.finish is None or not self._stores.keep_something:
            return
        try:
            if self._rows is not None:
                self._rows.submit(self._remember, running)
            else:
                self._remember(running)
        except RuntimeError:  # the lanes are closing
            _log.debug("what a batch computed is not kept: the engine stops")

    def _remember(self, running: _Running) -> None:
        try:
            assert running.finish is not None
            running.finish.remember()
        except Exception:
            _log.exception("the lower layers of a batch could not be kept")

    def _ahead_s(self, running: _Running) -> float:
        issue_s = running.issued_s - running.started_s if self._device.runs_ahead else 0.0
        if (prepared := running.prepared) is None or not prepared.end.done():
            return issue_s
        return issue_s + prepared.end.since_s(prepared.begin)

    def _tell(
        self,
        running: _Running,
        outcomes: list[Outcome],
        ways: list[Way],
        compute_s: float,
        ahead_s: float = 0.0,
        *,
        reran: bool = False,
        work: float = 1.0,
    ) -> None:
        left, took = iter(outcomes), iter(ways)
        every = [next(left) if kept else LEFT for kept in running.keep]
        taken = [next(took) if kept else Way() for kept in running.keep]
        counts = running.num_tokens, compute_s, running.num_threads, reran, ahead_s, running.out_of_memory, work
        running.answer.set_result(Computed(every, taken, *counts))

    # ---- on the compute thread, after a failure ----------------------------------------------------------------------

    def _rerun(self, running: _Running) -> None:
        with _told(running.answer):
            if running.out_of_memory:
                self._model.free_memory()
            groups = groupby(running.sequences, key=lambda sequence: sequence.tenant)
            rerun = [each for _, group in groups for each in self._alone(list(group), running.launch.batch_id)]
            nobody_is_to_blame = all(isinstance(outcome, Tensor) for outcome, _ in rerun)
            if running.finish is not None and not running.out_of_memory and nobody_is_to_blame:
                running.finish.forget()  # so what was stored may be
            # what was issued before something raised still runs and reads modules that may go when this is told
            self._device.compute.synchronize()
            outcomes, ways = [outcome for outcome, _ in rerun], [way for _, way in rerun]
            self._tell(running, outcomes, ways, self._clock.now_s() - running.started_s, reran=True)

    def _alone(self, sequences: list[SequenceInput], batch_id: int) -> list[tuple[Outcome, Way]]:
        """The sequences of one tenant, whose errors concern nobody else, each with its way."""
        try:
            sequences = [without_stores(sequence) for sequence in sequences]
            prepared = self._inline(sequences)
            finish = self._launch(prepared, sequences, batch_id)
            outputs = finish.answers()
        except Exception as error:
            _log.error("a batch of one tenant failed", exc_info=error)
            if is_out_of_memory(error) and len(sequences) > 1:
                self._model.free_memory()
                half = len(sequences) // 2
                return [*self._alone(sequences[:half], batch_id), *self._alone(sequences[half:], batch_id)]
            return [(ComputeFailed(f"the forward pass of this tenant failed: {error}"), Way())] * len(sequences)
        broken = ComputeFailed("this tenant's numbers are not finite; look at its training, and at its n-gram tables")
        return [
            (output if is_finite(output) else broken, way) for output, way in zip(outputs, finish.ways, strict=True)
        ]


@contextmanager
def _told(answer: Future[Computed]) -> Iterator[None]:
    """Whoever waits for a batch learns of what goes wrong with it, even if that is a bug of ours."""
    try:
        yield
    except BaseException as error:
        answer.set_exception(error)


def _failed(error: Exception, num_sequences: int) -> bool:
    """Log why a batch failed. Whether memory was short."""
    _log.error("a batch of %d sequences failed; trying tenant by tenant", num_sequences, exc_info=error)
    return is_out_of_memory(error)


def _check_owned(tenants: Iterable[ResidentTenant]) -> None:
    """The last line against the worst bug: no answer leaves that was computed with another tenant's module."""
    for tenant in tenants:
        if not tenant.owned():
            raise ComputeFailed(
                f"the slots of {tenant.digest[:12]} changed hands while in use; this is a bug, report it"
            )
