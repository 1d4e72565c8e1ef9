"""N-grams that texts did without are computed after their answers, while nothing else is, for texts to come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from runtime.ngram_store import NgramStore
from runtime.streams import Device
from vbert.local_layers import LocalLayers

__all__ = ["NgramLearner"]

_PIECE = 8  # n-grams at a time: a request that comes meanwhile waits for so many, some milliseconds
_LOOK_S = 0.05
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramLearner:
    """idle: whether nothing waits, or runs. compute: the lane that all forwards run on."""

    ngrams: NgramStore
    local: LocalLayers
    device: Device
    compute: Executor
    idle: Callable[[], bool]

    async def run(self) -> None:
        """Until cancelled."""
        was_idle = False
        while True:
            await asyncio.sleep(_LOOK_S)
            was_idle, before = self.idle(), was_idle
            if was_idle and before:  # since the last look, probably: who sends one text after another is not waited for
                await asyncio.get_running_loop().run_in_executor(self.compute, self._learn)

    def _learn(self) -> None:
        """On the compute thread."""
        if not len(keys := self.ngrams.wanted(_PIECE)):
            return
        try:
            with self.device.compute.current():
                rows = self.local.encode(keys).to("cpu")  # waits for a GPU
            self.ngrams.keep(keys, rows)
        except Exception:
            _log.exception("%d n-grams that texts did without could not be computed", len(keys))
