"""The tier between disk and device: modules in pinned host memory, from where uploads take them.

State is touched by the event loop only; files are read in the loader threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field

from runtime.errors import ModuleTooLarge
from runtime.module_files import ModuleFiles
from runtime.residency import ResidencyPolicy, make_way
from vbert.arena import Arena, Reservation, ResidentTenant
from vbert.header import TenantHeader

__all__ = ["HostTier"]


@dataclass(kw_only=True, eq=False)
class HostTier:
    """load_cost: seconds to read so many bytes again, for the policy."""

    arena: Arena
    budget_bytes: int
    files: ModuleFiles
    lane: Executor
    policy: ResidencyPolicy
    load_cost: Callable[[int], float]
    _modules: dict[str, ResidentTenant] = field(default_factory=dict)
    _users: dict[str, int] = field(default_factory=dict)
    _loading: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    num_bytes: int = 0  # of modules here or on their way

    async def take(self, digest: str, header: TenantHeader) -> ResidentTenant:
        """The module, which stays until `leave`; read once, whoever asks meanwhile.

        Raises what reading it raises, ModuleTooLarge.
        """
        while (loading := self._loading.get(digest)) is not None:
            await asyncio.wait([loading])
        if digest not in self._modules:
            ended = self._loading[digest] = asyncio.get_running_loop().create_future()
            try:
                await self._read(digest, header)
            finally:
                del self._loading[digest]
                ended.set_result(None)
        self._users[digest] = self._users.get(digest, 0) + 1
        self.policy.used(digest)
        return self._modules[digest]

    def leave(self, digest: str) -> None:
        """The one who took the module does not read it any more."""
        self._users[digest] -= 1
        if not self._users[digest]:
            del self._users[digest]
            self._changed.set()

    async def _read(self, digest: str, header: TenantHeader) -> None:
        reservation = await self._reserve(header, digest)
        try:
            fill = asyncio.get_running_loop().run_in_executor(
                self.lane, self.arena.fill, reservation, self.files.path(digest), self.files
            )
            self._modules[digest] = await fill
        except BaseException:
            self._release(reservation)
            raise
        self.policy.arrived(digest, reservation.num_bytes, self.load_cost(reservation.num_bytes))

    async def _reserve(self, header: TenantHeader, digest: str) -> Reservation:
        need_bytes = self.arena.num_bytes(header)
        if need_bytes > self.budget_bytes:
            raise ModuleTooLarge(
                f"the module takes {need_bytes} bytes, host_budget_bytes is {self.budget_bytes}; raise the budget"
            )
        if not self.arena.can_hold(header):
            raise ModuleTooLarge(
                f"a slot of the module does not fit into the {self.budget_bytes} bytes of host_budget_bytes; raise it"
            )
        while True:
            victims = self.policy.victims(need_bytes - (self.budget_bytes - self.num_bytes), self._users.__contains__)
            for victim in victims or ():
                self._evict(victim)
            if victims is not None:
                if (reservation := self.arena.reserve(header, digest)) is not None:
                    self.num_bytes += reservation.num_bytes
                    return reservation
                rivals = make_way(self.policy, *self.arena.rivals(header), self._must_stay)
                for victim in rivals or ():
                    self._evict(victim)
                if rivals:
                    continue
            self._changed.clear()
            await self._changed.wait()

    def _must_stay(self, digest: str) -> bool:
        return digest in self._users or digest not in self._modules

    def _evict(self, digest: str) -> None:
        self._release(self._modules.pop(digest).reservation)
        self.policy.left(digest)

    def _release(self, reservation: Reservation) -> None:
        self.arena.release(reservation)
        self.num_bytes -= reservation.num_bytes
        self._changed.set()
