"""How modules come to a device: from disk into host memory, and from there into their slots, layer by layer.

State is touched by the event loop only, but for `arriving`, which the compute thread asks, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import torch

from runtime.host_tier import HostTier
from runtime.uploads import Arrival, Uploads, module_pieces
from vbert.arena import Reservation, ResidentTenant

__all__ = ["ThroughHost"]


@dataclass(kw_only=True, eq=False)
class ThroughHost:
    """spawn: starts a task."""

    host: HostTier
    uploads: Uploads
    device: torch.device
    lane: Executor
    spawn: Callable[[Coroutine[Any, Any, None]], object]
    _arriving: dict[str, Arrival] = field(default_factory=dict)

    def arriving(self, tenant: ResidentTenant) -> Arrival | None:
        """The upload that brings a module, until it has ended well or the module has left."""
        return self._arriving.get(tenant.digest)

    async def upload(
        self, source: ResidentTenant, reservation: Reservation, failed: Callable[[str, Exception], None]
    ) -> ResidentTenant:
        """Into the slots, from a module that was taken from `host` and is left when it was read. Returns at once: a
        batch waits for each layer when it comes to it. failed: called if the upload fails later."""
        digest = reservation.digest

        def start() -> tuple[Arrival, ResidentTenant]:
            moved = source.moved(reservation, self.device)
            return self.uploads.start(module_pieces(source, reservation), digest[:12]), moved

        try:
            arrival, moved = await asyncio.get_running_loop().run_in_executor(self.lane, start)
        except BaseException:
            self.host.leave(digest)
            raise
        self._arriving[digest] = arrival
        self.spawn(self._arrived(digest, arrival, failed))
        return moved

    def forget(self, digest: str) -> None:
        """The module left its slots."""
        self._arriving.pop(digest, None)

    async def _arrived(self, digest: str, arrival: Arrival, failed: Callable[[str, Exception], None]) -> None:
        """Let the host's copy go when it was read. Batches that use a module whose upload failed, before it is gone,
        still find the arrival, which raises."""
        try:
            await asyncio.get_running_loop().run_in_executor(self.lane, arrival.synchronize)
        except Exception as error:
            if self._arriving.get(digest) is arrival:
                failed(digest, error)
        else:
            if self._arriving.get(digest) is arrival:  # else it left meanwhile, and comes again
                del self._arriving[digest]
        finally:
            self.host.leave(digest)
