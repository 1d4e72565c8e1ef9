"""Whether there is room in the queue, a bound for each caller and one for all, and time; and when to come back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from runtime.errors import DeadlineExceeded, DeadlineUnreachable, QueueFull, RequestTooLarge, ServerFull
from runtime.policies.token_budget import DEADLINE_PART
from runtime.waiting import WaitingQueue

__all__ = ["Room"]

_UNKNOWN_RETRY_S = 1.0  # before the first batch there is nothing measured to tell


class Room:
    """Counts inputs, not requests: a list of a thousand counts as a thousand.

    Args:
        max_inputs: of all callers together.  caller_share: part of it that one caller may fill.
        rate: measured tokens per second, None before the first batch.  batch_tokens: of a full batch.
    """

    def __init__(
        self,
        queue: WaitingQueue,
        *,
        max_inputs: int,
        caller_share: float,
        batch_tokens: int,
        rate: Callable[[], float | None],
    ) -> None:
        self._queue, self._max, self._batch_tokens, self._rate = queue, max_inputs, batch_tokens, rate
        self._share = max(1, int(max_inputs * caller_share))
        self._aside: Counter[str] = Counter()  # inputs by caller that are admitted and not in the queue yet

    def check(self, caller: str, num_inputs: int) -> None:
        """Raises RequestTooLarge (never fits), QueueFull (the caller's share), ServerFull."""
        if num_inputs > self._share:
            raise RequestTooLarge(
                f"{num_inputs} inputs, one caller may queue {self._share}; send fewer at once", param="input"
            )
        mine = self._queue.inputs_of(caller) + self._aside[caller]
        if mine + num_inputs > self._share:
            raise QueueFull(
                f"{mine} inputs of this caller wait, {self._share} may; send {num_inputs} more later",
                retry_after_s=self._retry_after_s(mine + num_inputs - self._share, mine),
            )
        everyone = self._queue.num_inputs + self._aside.total()
        if everyone + num_inputs > self._max:
            raise ServerFull(
                f"{everyone} inputs wait, {self._max} may; send {num_inputs} more later",
                retry_after_s=self._retry_after_s(everyone + num_inputs - self._max, everyone),
            )

    def check_deadline(self, tokens: int, left_s: float, running_s: float, before: Callable[[], int]) -> None:
        """Whether an answer that is wanted in left_s seconds can be in time, at the measured speed.

        running_s: what runs will take. before: tokens that would go first. Raises DeadlineUnreachable, or
        DeadlineExceeded where the request alone takes too long.
        """
        rate = self._rate()
        if rate is None or running_s + (self._queue.num_tokens + tokens + self._batch_tokens) / rate <= left_s:
            return
        if tokens / rate > left_s:
            raise DeadlineExceeded(
                f"{tokens} tokens take {tokens / rate:.3g} s at the present speed, {max(0.0, left_s):.3g} s are left; "
                "allow more time or send less at once"
            )
        ahead = before()
        tokens += ahead
        batch = max(1, min(self._batch_tokens, int(DEADLINE_PART * left_s * rate)))
        if ahead and tokens > batch:  # then its batch will be full, too, and all of it is answered when it ends
            tokens = -(-tokens // batch) * batch
        needs_s = running_s + tokens / rate
        if needs_s > left_s:
            raise DeadlineUnreachable(
                f"an answer would take {needs_s:.3g} s, {max(0.0, left_s):.3g} s are left; ask later or allow more",
                retry_after_s=needs_s - left_s,
            )

    @contextmanager
    def aside(self, caller: str, num_inputs: int) -> Iterator[None]:
        """Count inputs as waiting that are still being tokenised."""
        self._aside[caller] += num_inputs
        try:
            yield
        finally:
            self._aside[caller] -= num_inputs
            if not self._aside[caller]:
                del self._aside[caller]

    def _retry_after_s(self, excess: int, waiting: int) -> float:
        """When `excess` of `waiting` inputs will have gone, at the measured speed; a caller's inputs go as all do."""
        rate = self._rate()
        if rate is None or not self._queue.num_tokens:
            return _UNKNOWN_RETRY_S
        return self._queue.num_tokens / rate * min(1.0, excess / max(1, waiting))
