"""One admitted request on its way from the tokenizer to its answer. Touched by the event loop only."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from runtime.request import Input, Served, Timings, Waiting, Way
from vbert.errors import VbertError
from vbert.tokenizer import Encoded

__all__ = ["Pending"]


@dataclass(slots=True, kw_only=True, eq=False)
class Pending:
    """outputs: per input the raw output of the head, None until computed; ways: how it came through, by one of the
    paths it may_take, leaving early with an answer more confident than exit_above. cold_since_s: when the request began
    to wait for its module, None while the module is in memory. `future` holds nothing but the fact, or the error."""

    request_id: int
    method: str
    served: Served
    caller: str
    inputs: Sequence[Input]
    encoded: Sequence[Encoded]
    arrival_s: float
    enqueued_s: float
    deadline_s: float | None
    future: asyncio.Future[None]
    priority: str = "interactive"
    weight: float = 1.0
    may_take: tuple[str, ...] = ("plain",)
    exit_above: float = 1.0
    cold_since_s: float | None = None
    load_s: float = 0.0
    compute_s: float = 0.0
    outputs: list[Tensor | None] = field(default_factory=list)
    ways: list[Way] = field(default_factory=list)
    missing: int = 0
    timings: Timings = field(init=False)  # once all inputs are computed

    def __post_init__(self) -> None:
        self.outputs, self.ways = [None] * len(self.encoded), [Way()] * len(self.encoded)
        self.missing = len(self.encoded)

    def as_waiting(self) -> Waiting:
        return Waiting(
            request_id=self.request_id,
            key=self.served.key,
            caller=self.caller,
            arrival_s=self.arrival_s,
            deadline_s=self.deadline_s,
            lengths=tuple(len(e.token_ids) for e in self.encoded),
            weight=self.weight,
            priority=self.priority,
            kind=self.served.kinds[0] if self.served.kinds else "",
        )

    def make_cold(self, now_s: float) -> None:
        if self.cold_since_s is None:
            self.cold_since_s = now_s

    def make_ready(self, now_s: float) -> None:
        if self.cold_since_s is not None:
            self.load_s += now_s - self.cold_since_s
            self.cold_since_s = None

    def deliver(
        self, first: int, outputs: Sequence[Tensor], ways: Sequence[Way], *, compute_s: float, now_s: float
    ) -> None:
        """Outputs of some inputs arrived; the last ones resolve the future."""
        self.outputs[first : first + len(outputs)] = outputs
        self.ways[first : first + len(outputs)] = ways
        self.missing -= len(outputs)
        self.compute_s += compute_s
        if not self.missing and not self.future.done():
            self.timings = self._split(now_s)
            self.future.set_result(None)

    def fail(self, error: VbertError) -> None:
        """Resolve with an error, unless the request was answered or left."""
        if not self.future.done():
            self.future.set_exception(error)

    def _split(self, finished_s: float) -> Timings:
        """The stages add up to the total: what is neither tokenising, loading nor computing was waiting."""
        total_s = finished_s - self.arrival_s
        tokenize_s = self.enqueued_s - self.arrival_s
        queue_s = max(0.0, total_s - tokenize_s - self.load_s - self.compute_s)
        return Timings(
            tokenize_s=tokenize_s, queue_s=queue_s, load_s=self.load_s, compute_s=self.compute_s, total_s=total_s
        )
