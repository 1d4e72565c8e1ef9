"""What follows when the device runs out of memory: smaller batches, and for a moment no new requests. Pure."""

from __future__ import annotations

import torch

from runtime.clock import Clock
from runtime.errors import ServerFull

__all__ = ["MemoryPressure", "is_out_of_memory"]

_PAUSE_S = 1.0  # admission; what waits is computed meanwhile, in smaller batches
_GROWTH = 1.1  # of the limit with each batch that nearly filled it


class MemoryPressure:
    """max_tokens: of a batch, while memory suffices."""

    def __init__(self, max_tokens: int, clock: Clock) -> None:
        self._max_tokens = self.batch_tokens = max_tokens  # the second is what a batch may have now
        self._clock = clock
        self._paused_until_s = 0.0

    @property
    def refusal(self) -> ServerFull | None:
        """Why nothing is admitted now."""
        left_s = self._paused_until_s - self._clock.now_s()
        if left_s <= 0:
            return None
        return ServerFull(
            "the device ran out of memory and recovers; ask again, or lower max_batch_tokens or module_budget_bytes",
            retry_after_s=left_s,
        )

    def observe(self, num_tokens: int, out_of_memory: bool) -> None:
        """A batch of so many tokens ended, or did not fit."""
        if out_of_memory:
            self.batch_tokens = max(1, min(self.batch_tokens, num_tokens) // 2)
            self._paused_until_s = self._clock.now_s() + _PAUSE_S
        elif 2 * num_tokens > self.batch_tokens:
            self.batch_tokens = min(self._max_tokens, int(self.batch_tokens * _GROWTH) + 1)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there was too little memory, of a device or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    says = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # torch's CPU allocator, and cuBLAS
    return isinstance(error, RuntimeError) and any(text in str(error) for text in says)
