"""N-grams that texts did without are computed after their answers, for texts to come: while nothing else is computed,
and for a small share of the time where something always is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from runtime.clock import Clock
from runtime.ngram_store import NgramStore
from runtime.streams import Device
from vbert.local_layers import LocalLayers

__all__ = ["NgramLearner"]

_PIECE = 8  # n-grams at a time: a request that comes meanwhile waits for so many, some milliseconds
_LOOK_S = 0.05
_SHARE = 0.01  # of the time, while texts keep coming
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramLearner:
    """idle: whether nothing waits, or runs. compute: the lane that all forwards run on."""

    ngrams: NgramStore
    local: LocalLayers
    device: Device
    compute: Executor
    idle: Callable[[], bool]
    clock: Clock

    async def run(self) -> None:
        """Until cancelled."""
        was_idle, next_s = False, self.clock.now_s()
        while True:
            await asyncio.sleep(_LOOK_S)
            was_idle, before = self.idle(), was_idle
            # idle twice: since the last look, probably; between two texts of who sends one after another it is not
            free = was_idle and before
            while self.ngrams.may_want and (free or self.clock.now_s() >= next_s):
                took_s, done = await asyncio.get_running_loop().run_in_executor(self.compute, self._learn)
                next_s = self.clock.now_s() + took_s / _SHARE
                was_idle = was_idle and self.idle()
                free = free and was_idle and done

    def _learn(self) -> tuple[float, bool]:
        """Seconds it took, and whether it could be done. On the compute thread."""
        began_s, keys, done = self.clock.now_s(), self.ngrams.wanted(_PIECE), True
        try:
            if len(keys):
                with self.device.compute.current():
                    rows = self.local.encode(keys).to("cpu")  # waits for a GPU
                self.ngrams.keep(keys, rows)
        except Exception:
            done = False
            _log.exception("%d n-grams that texts did without could not be computed", len(keys))
        return self.clock.now_s() - began_s, done
