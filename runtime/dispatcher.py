"""Admission: who may wait, with what, for how long. Tokenises, keeps one future a request, resolves it exactly once.

Everything runs on the event loop but long tokenising. The dispatcher does not know when or how a request is computed:
it hands inputs out (`take`), gets outputs back (`Pending.deliver`) and is told of modules that come and go.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from runtime.clock import Clock
from runtime.config import EngineConfig
from runtime.errors import DeadlineExceeded, Draining
from runtime.exit_rules import ExitRules
from runtime.inputs import check_inputs, check_method, in_chunks
from runtime.metrics import Metrics
from runtime.paths import PathRules
from runtime.pending import Pending
from runtime.request import PRIORITIES, Input, Served, Slice, Waiting
from runtime.room import Room
from runtime.waiting import WaitingQueue
from runtime.weight_rules import WeightRules
from vbert.errors import BadRequest, InputTooLong, VbertError
from vbert.tokenizer import Encoded, Tokenizer

__all__ = ["CANARY", "Dispatcher", "Terms"]

CANARY = "canary"  # the caller name of the engine's own requests, counted apart
_INLINE_CHARS = 4_000  # tokenised on the event loop: under 1 ms; a thread would cost as much


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a caller wants a request treated. deadline_s: seconds from now. truncate: cut what is too long. path: how its
    inputs pass the lower layers (runtime/paths.py), exit_threshold: how confident an answer must be to leave early
    (runtime/exit_rules.py); None: as its tenant's do. priority: one of PRIORITIES."""

    deadline_s: float | None = None
    truncate: bool = False
    caller: str = "local"
    path: str | None = None
    exit_threshold: float | None = None
    priority: str = "interactive"


@dataclass(kw_only=True, eq=False)
class Dispatcher:
    """serves: what a tenant's active version serves, or raises. is_ready: whether a module is in memory, or raises what
    is wrong with it. rate: measured tokens per second, None before the first batch. running_s: how long what runs will
    take. before: tokens that wait and go before a request. pressure: why nothing is admitted for a moment. wake: called
    when requests came or left. record: of every request that was tokenised, with its outcome."""

    config: EngineConfig
    tokenizer: Tokenizer
    lane: Executor
    serves: Callable[[str], Served]
    is_ready: Callable[[str], bool]
    rate: Callable[[], float | None]
    running_s: Callable[[], float]
    before: Callable[[Waiting], int]
    pressure: Callable[[], VbertError | None]
    wake: Callable[[], None]
    record: Callable[[Pending, str], None]
    paths: PathRules
    exits: ExitRules
    weights: WeightRules
    clock: Clock
    metrics: Metrics
    queue: WaitingQueue = field(default_factory=WaitingQueue)

    def __post_init__(self) -> None:
        self.refusal: VbertError | None = None  # why nothing is admitted any more
        self._abandoned: VbertError | None = None  # why nothing admitted is computed any more
        self._empty = asyncio.Event()
        self.live: Counter[str] = Counter()  # admitted, unanswered requests by digest: their files must stay
        self._room = Room(
            self.queue,
            max_inputs=self.config.max_queue_inputs,
            caller_share=self.config.max_caller_share,
            batch_tokens=self.config.max_batch_tokens,
            rate=self.rate,
        )
        self._open: dict[int, Pending] = {}
        self._ids = count(1)

    @property
    def num_open(self) -> int:
        """Requests admitted and not answered, those being tokenised included."""
        return self.live.total()

    async def submit(self, method: str, tenant: str, inputs: Any, terms: Terms) -> Pending:
        """Admit one request and wait until all its inputs are computed.

        Cancelling the caller takes the request out of the queue. Raises every BadRequest and Overloaded there is, and
        what loading or computing the tenant raised.
        """
        outcome, pending = "internal_error", None
        try:
            with ExitStack() as living:
                pending = await self._admit(method, tenant, inputs, terms, living)
                await self._answer(pending)
            outcome = "ok"
            self._count(pending)
            return pending
        except VbertError as error:
            outcome = error.code
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self.metrics.requests[method if terms.caller != CANARY else CANARY, outcome] += 1
            if not self.num_open:
                self._empty.set()
            if pending is not None and terms.caller != CANARY:
                self.record(pending, outcome)

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing any more, wait for what was admitted, and fail what is not done in time."""
        self.refusal = Draining("the server is stopping and takes no new requests; ask another one")
        self._empty.clear()
        if self.num_open:
            try:
                await asyncio.wait_for(self._empty.wait(), timeout_s)
            except TimeoutError:
                self.abandon(
                    Draining(f"the server stopped and this was not done after {timeout_s:.3g} s; ask another one")
                )

    def oldest_open_s(self) -> float | None:
        """When the oldest unanswered request was queued."""
        return next((pending.enqueued_s for pending in self._open.values()), None)

    def take(self, piece: Slice) -> Pending:
        """The request of a slice, whose inputs leave the queue for a batch."""
        self.queue.take(piece.request_id, piece.last - piece.first)
        return self._open[piece.request_id]

    def expire(self, request_ids: Iterable[int]) -> None:
        """Fail requests past their deadline, computed in part or not."""
        for request_id in request_ids:
            pending = self._open[request_id]
            assert pending.deadline_s is not None
            self.fail(pending, _too_late(pending.deadline_s - pending.arrival_s))

    def abandon(self, error: VbertError) -> None:
        """Fail every open request and admit none: the engine stops or broke."""
        self.refusal = self._abandoned = error
        for pending in tuple(self._open.values()):
            self.fail(pending, error)

    def fail(self, pending: Pending, error: VbertError) -> None:
        """Answer with an error, unless it was answered or its caller left. Each request gets its own copy: an exception
        that is raised twice collects both tracebacks."""
        self._close(pending)
        pending.fail(copy(error))

    # ---- modules come and go (manager.ResidencyListener) -----------------------------------------------------------

    def arrived(self, digest: str) -> None:
        now_s = self.clock.now_s()
        for request_id in self.queue.cold.get(digest, ()):
            self._open[request_id].make_ready(now_s)
        self.queue.arrive(digest)

    def left(self, digest: str) -> None:
        self.queue.leave(digest)
        now_s = self.clock.now_s()
        for request_id in self.queue.cold.get(digest, ()):
            self._open[request_id].make_cold(now_s)

    def failed(self, digest: str, error: VbertError) -> None:
        for request_id in tuple(self.queue.cold.get(digest, ())):
            self.fail(self._open[request_id], error)

    def waits_for(self, digest: str) -> bool:
        return self.queue.waits_for(digest)

    # ---- admission -------------------------------------------------------------------------------------------------

    async def _admit(self, method: str, tenant: str, inputs: Any, terms: Terms, living: ExitStack) -> Pending:
        """Checked and tokenised, not in the queue yet. living: until it ends, the tenant's file stays."""
        arrival_s = self.clock.now_s()
        pressure = None if terms.caller == CANARY else self.pressure()
        if (refusal := self.refusal or pressure) is not None:
            raise copy(refusal)
        if not isinstance(tenant, str):
            raise BadRequest(f"the tenant is of type {type(tenant).__name__}; give its name", param="model")
        served = self.serves(tenant)
        check_method(served, method)
        paths = self.paths.allowed(served, terms.path)
        exit_above = self.exits.threshold(served, terms.exit_threshold) if method == "classify" else 1.0
        num_chars = check_inputs(
            inputs, method, max_inputs=self.config.max_request_inputs, max_chars=self.config.max_input_chars
        )
        inputs = list(inputs)
        _check_priority(terms.priority)
        deadline_s = arrival_s + _checked_deadline(terms.deadline_s, self.config.default_deadline_s)
        living.enter_context(self._living(served.key.digest))
        self._room.check(terms.caller, len(inputs))
        if num_chars <= _INLINE_CHARS:
            encoded = self._encode(method, served, terms, inputs)
        else:
            with self._room.aside(terms.caller, len(inputs)):
                encoded = await self._encode_aside(method, served, terms, inputs, deadline_s)
        return Pending(
            request_id=next(self._ids),
            method=method,
            served=served,
            caller=terms.caller,
            inputs=inputs,
            encoded=encoded,
            may_take=paths,
            exit_above=exit_above,
            arrival_s=arrival_s,
            enqueued_s=self.clock.now_s(),
            deadline_s=deadline_s,
            priority=terms.priority,
            weight=self.weights.weight(tenant),
            future=asyncio.get_running_loop().create_future(),
        )

    async def _answer(self, pending: Pending) -> None:
        """Through the queue. Raises what became of it."""
        if pending.caller != CANARY:
            self._check_time(pending)
        self._enqueue(pending)
        try:
            await pending.future
        finally:
            self._close(pending)

    def _check_time(self, pending: Pending) -> None:
        """Raises DeadlineUnreachable, DeadlineExceeded."""
        assert pending.deadline_s is not None
        waiting = pending.as_waiting()
        left_s = pending.deadline_s - pending.enqueued_s
        self._room.check_deadline(waiting.tokens, left_s, self.running_s(), lambda: self.before(waiting))

    def _enqueue(self, pending: Pending) -> None:
        if self._abandoned is not None:
            raise copy(self._abandoned)
        ready = self.is_ready(pending.served.key.digest)
        if not ready:
            pending.make_cold(pending.enqueued_s)
        self._open[pending.request_id] = pending
        self.queue.add(pending.as_waiting(), ready=ready)
        self.wake()

    def _close(self, pending: Pending) -> None:
        """The request waits no longer; may be called again."""
        if self._open.pop(pending.request_id, None) is not None:
            self.queue.forget(pending.request_id, pending.deadline_s)
            self.wake()

    @contextmanager
    def _living(self, digest: str) -> Iterator[None]:
        self.live[digest] += 1
        try:
            yield
        finally:
            self.live[digest] -= 1
            if not self.live[digest]:
                del self.live[digest]

    async def _encode_aside(
        self, method: str, served: Served, terms: Terms, inputs: Sequence[Input], deadline_s: float
    ) -> list[Encoded]:
        """Tokenise in the thread for it, in pieces, so that other requests get their turn. Raises DeadlineExceeded."""
        encoded: list[Encoded] = []
        for chunk in in_chunks(inputs):
            encode = partial(self._encode, method, served, terms, chunk, before=len(encoded))
            encoded += await asyncio.get_running_loop().run_in_executor(self.lane, encode)
            if self._abandoned is not None:
                raise copy(self._abandoned)
            if self.clock.now_s() >= deadline_s:
                raise DeadlineExceeded("the deadline passed while the input was tokenised; allow more time")
        return encoded

    def _encode(
        self, method: str, served: Served, terms: Terms, inputs: Sequence[Input], *, before: int = 0
    ) -> list[Encoded]:
        """Raises InputTooLong; `before` inputs of the request came before these."""
        max_length = served.max_length if terms.truncate else None
        encoded = self.tokenizer.encode(inputs, max_length=max_length, offsets=method == "token_classify")
        for i, one in enumerate(encoded, before):
            if one.full_length > served.max_length and not terms.truncate:
                whose = f"tenant {served.key.tenant!r}" if served.own_limit else "the backbone"
                raise InputTooLong(
                    f"input {i} has {one.full_length} tokens, {whose} takes {served.max_length}; shorten it or send "
                    "truncate: true",
                    param="input",
                )
        return encoded

    def _count(self, pending: Pending) -> None:
        self.metrics.inputs[pending.method] += len(pending.encoded)
        self.metrics.paths.update(way.path for way in pending.ways)
        self.metrics.exits.update(way.exit for way in pending.ways if way.exit)
        self.metrics.tokens += sum(len(e.token_ids) for e in pending.encoded)
        self.metrics.observe_request(pending.served.kinds, pending.timings)


def _checked_deadline(deadline_s: float | None, default_s: float) -> float:
    if deadline_s is None:
        return default_s
    if isinstance(deadline_s, bool) or not isinstance(deadline_s, int | float) or not 0 < deadline_s < math.inf:
        raise BadRequest(f"deadline_s is {deadline_s!r}; give seconds above 0", param="deadline_s")
    return float(deadline_s)


def _check_priority(priority: Any) -> None:
    if priority not in PRIORITIES:
        raise BadRequest(f"priority is {priority!r}; give {' or '.join(PRIORITIES)}", param="priority")


def _too_late(allowed_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"no answer within the {allowed_s:.3g} s allowed; allow more time or send less at once")
