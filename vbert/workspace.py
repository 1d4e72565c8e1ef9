"""`Workspace`: the large intermediate results of one forward, kept for the next one.

Fresh memory of their size costs a page fault every 4 KiB, most of all in a process whose heap is busy. A workspace
serves one forward at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Workspace"]


class Workspace:
    """Named buffers that grow to the largest batch seen."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self.device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def rows(self, name: str, rows: int, width: int) -> Tensor:
        """[rows, width] with anything in it, valid until the same name is asked for again."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * width:
            buffer = torch.empty(rows * width, dtype=self._dtype, device=self.device)
            self._buffers[name] = buffer
        return buffer[: rows * width].view(rows, width)
