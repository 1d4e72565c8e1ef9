"""Carries out residency: loads tenant modules beside the compute lane, pins them while in use, evicts, counts bytes.

All state is touched by the event loop only; files are read in the loader threads. Concurrent requests for one module
load it once, a load that must wait for room holds up no module that is in memory, and a load that fails is the trouble
of its own tenant. Knows modules by digest, never tenants by name.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Executor
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from runtime.clock import Clock
from runtime.errors import ComputeFailed, Draining, ModuleTooLarge
from runtime.metrics import Metrics
from runtime.module_files import ModuleFiles
from runtime.residency import LfuAgeing, ResidencyPolicy, make_way
from runtime.through_host import ThroughHost
from vbert.arena import Arena, Reservation, ResidentTenant
from vbert.errors import CorruptFile, VbertError
from vbert.header import TenantHeader, read_header
from vbert.tenant import SelfTest

__all__ = ["Manager", "ResidencyListener", "Verifier", "typical_load_s"]

_HINTS_AT_ONCE = 16  # as many share one batch of self-tests (runtime/pipeline.py)
_FORGET_FAILURE_S = 1.0  # a broken module asked for in a loop is read at most this often
_log = logging.getLogger(__name__)


def typical_load_s(num_bytes: int) -> float:
    """Where no profile says better: 1 ms of fixed work, then 1 GB/s."""
    return 1e-3 + num_bytes * 1e-9


class _NoRoom(Exception):
    """A module that nobody waits for finds no free room."""


class Verifier(Protocol):
    """Who has the self-tests of a module."""

    def tests(self, tenant: ResidentTenant) -> Awaitable[tuple[SelfTest, ...]]: ...
    def verify(self, tenant: ResidentTenant, tests: Sequence[SelfTest]) -> Awaitable[None]: ...


class ResidencyListener(Protocol):
    """Who holds the requests."""

    def arrived(self, digest: str) -> None: ...
    def left(self, digest: str) -> None: ...
    def failed(self, digest: str, error: VbertError) -> None: ...
    def waits_for(self, digest: str) -> bool: ...


@dataclass(slots=True, eq=False)
class _Entry:
    """`ran`: whether a batch used it since it was loaded. Until then it stays for the requests it was loaded for,
    or two tenants could evict each other for ever without either being served. `leaving`: no new batch may use it, and
    it goes with the last one that does, or tenants that are always in use would never make room. `tests`: self-tests to
    be run with its next batch; none once they held."""

    tenant: ResidentTenant
    pins: int = 0
    ran: bool = False
    leaving: bool = False
    tests: tuple[SelfTest, ...] = ()


@dataclass(kw_only=True, eq=False)
class Manager:
    """self_tester: runtime/selftest.py.
    spawn: starts a task. wake: called after every change that may let something run. load_cost: seconds to bring in a
    module of so many bytes, for the policy. through: where they come to a device."""

    arena: Arena
    budget_bytes: int
    files: ModuleFiles
    self_tester: Verifier
    listener: ResidencyListener
    lane: Executor
    spawn: Callable[[Coroutine[Any, Any, None]], object]
    wake: Callable[[], None]
    clock: Clock
    metrics: Metrics
    through: ThroughHost | None = None
    policy: ResidencyPolicy = field(default_factory=LfuAgeing)
    load_cost: Callable[[int], float] = typical_load_s

    def __post_init__(self) -> None:
        self._resident: dict[str, _Entry] = {}
        self._held: Mapping[str, int] = {}
        self._loading: dict[str, asyncio.Future[None]] = {}  # done when the load ended, well or not
        self._hinted: set[str] = set()  # those of them that no request asked for
        self._hints = asyncio.Semaphore(_HINTS_AT_ONCE)
        self._bytes: Counter[str] = Counter()
        self._verified: set[str] = set()
        self._failures: dict[str, tuple[VbertError, float]] = {}
        self._room = asyncio.Lock()  # first come, first served: a large module is not overtaken for ever
        self._changed = asyncio.Event()

    # ---- reading ---------------------------------------------------------------------------------------------------

    @property
    def loading(self) -> Collection[str]:
        """Modules on their way for requests, in the order they were asked for."""
        return [digest for digest in self._loading if digest not in self._hinted]

    @property
    def reading(self) -> Collection[str]:
        """Modules whose files are being read, for whomever."""
        return self._loading.keys()

    @property
    def resident(self) -> Collection[str]:
        return self._resident.keys()

    @property
    def bytes_by_kind(self) -> Counter[str]:
        """Bytes of every module in memory or on its way, by kind. Their sum never exceeds the budget."""
        return self._bytes

    def is_ready(self, digest: str) -> bool:
        """Whether the module is in memory; "" is the backbone itself. Raises the error of a load that just failed."""
        if (failure := self._failures.get(digest)) is not None:
            if self.clock.now_s() < failure[1]:
                raise copy(failure[0])
            del self._failures[digest]
        entry = self._resident.get(digest)
        return not digest or (entry is not None and not entry.leaving)

    async def num_bytes(self, digest: str) -> int:
        """What the module takes in memory. Raises what reading its header raises."""
        if not digest:
            return 0
        header = self.files.header(digest)
        if header is None:
            path = self.files.path(digest)
            header = await asyncio.get_running_loop().run_in_executor(self.lane, read_header, path)
        return self.arena.num_bytes(header)

    # ---- use -------------------------------------------------------------------------------------------------------

    def pin(self, digest: str) -> ResidentTenant | None:
        """The module, which stays until as many `unpin` came. None for the backbone itself."""
        if not digest:
            return None
        entry = self._resident[digest]
        entry.pins += 1
        self.policy.used(digest)
        return entry.tenant

    def unpin(self, digest: str) -> None:
        if digest:
            entry = self._resident[digest]
            entry.pins, entry.ran = entry.pins - 1, True
            if entry.leaving and not entry.pins:
                self._evict(digest)
            self.recheck()

    def tests(self, digest: str) -> tuple[SelfTest, ...]:
        """Self-tests that must hold before an answer of this module in memory may leave."""
        return self._resident[digest].tests if digest else ()

    def passed(self, digest: str) -> None:
        """The self-tests of a pinned module held."""
        self._resident[digest].tests = ()
        self._verified.add(digest)

    def refuse(self, digest: str, error: VbertError) -> None:
        """The self-tests of a module failed, or its upload: whoever waits for it gets the error, and it goes."""
        self._let_go(digest)
        self.metrics.loads[error.code] += 1
        self._remember(digest, error)
        self.listener.failed(digest, error)
        self.recheck()
        self.wake()

    def load(self, digest: str) -> None:
        """Begin to bring a module in, unless it is here, or on its way in or out."""
        if digest and digest not in self._resident and digest not in self._loading:
            self._begin(digest, patient=True)

    async def prefetch(self, digest: str) -> bool:
        """Bring a module in if there is free room, for requests that may come; evicts nothing. Whether it is here."""
        if not digest:
            return True
        async with self._hints:
            if digest not in self._resident and digest not in self._loading:
                self._hinted.add(digest)
                self._begin(digest, patient=False)
            if (ended := self._loading.get(digest)) is not None:
                await asyncio.wait([ended])
        return digest in self._resident

    def hold(self, modules: Mapping[str, int]) -> None:
        """Keep these (digest -> bytes) in memory from now on, bring in those that are not, and let others go again."""
        self._held = modules
        for digest in modules:
            self.load(digest)
        self.recheck()

    def drop(self, digest: str) -> None:
        """Let a module go that is here and not held, when nothing that runs uses it any more, whoever waits for it."""
        if digest in self._resident and digest not in self._held:
            self._let_go(digest)
            self.recheck()

    def recheck(self) -> None:
        """Something was unpinned, or a request left: loads that wait for room look again."""
        self._changed.set()

    # ---- loading ---------------------------------------------------------------------------------------------------

    def _begin(self, digest: str, *, patient: bool) -> None:
        load = self._load(digest, patient)
        self._loading[digest] = asyncio.get_running_loop().create_future()
        try:
            self.spawn(load)
        except RuntimeError as error:  # the engine's tasks are being cancelled
            load.close()
            del self._loading[digest]
            self._hinted.discard(digest)
            raise Draining("the server is stopping and loads no modules; ask another one") from error

    async def _load(self, digest: str, patient: bool) -> None:
        started_s, outcome = self.clock.now_s(), "ok"
        try:
            tenant, tests = await self._bring_in(digest, patient)
            self._resident[digest] = _Entry(tenant, tests=tests)
            self.policy.arrived(digest, tenant.num_bytes, self.load_cost(tenant.num_bytes))
            self.listener.arrived(digest)
        except _NoRoom:
            outcome = "no_room"
        except Exception as error:
            explained = _explained(error, digest)
            outcome = explained.code
            self._remember(digest, explained)
            self.listener.failed(digest, explained)
        finally:
            self._loading.pop(digest).set_result(None)
            self._hinted.discard(digest)
            self.metrics.loads[outcome] += 1
            self.metrics.load_s.observe(self.clock.now_s() - started_s)
            self.recheck()
            self.wake()

    def _remember(self, digest: str, error: VbertError) -> None:
        now_s = self.clock.now_s()
        recent = {other: failure for other, failure in self._failures.items() if failure[1] > now_s}
        self._failures = recent | {digest: (error, now_s + _FORGET_FAILURE_S)}

    async def _bring_in(self, digest: str, patient: bool) -> tuple[ResidentTenant, tuple[SelfTest, ...]]:
        """The module, and the self-tests to run with the requests that wait for it: none if they held before."""
        run, path = asyncio.get_running_loop().run_in_executor, self.files.path(digest)
        host = None if self.through is None else self.through.host
        known = self.files.header(digest)
        header = await run(self.lane, read_header, path) if known is None else known
        if not patient and not self._is_free(header):
            raise _NoRoom
        source = None if host is None else await host.take(digest, header)
        try:
            reservation = await self._reserve(header, digest) if patient else self._reserve_free(header, digest)
        except BaseException:
            self._leave_host(digest)
            raise
        try:
            if source is None or self.through is None:
                tenant = await run(self.lane, self.arena.fill, reservation, path, self.files)
            else:
                tenant = await self.through.upload(source, reservation, self._upload_failed)
            tests = () if digest in self._verified else await self.self_tester.tests(tenant)
            if tests and not patient:
                await self.self_tester.verify(tenant, tests)
                self._verified.add(digest)
                tests = ()
        except BaseException:
            self._release(reservation)
            raise
        return replace(tenant, self_tests=()), tests  # needed once; not worth memory

    def _upload_failed(self, digest: str, error: Exception) -> None:
        if digest in self._resident:
            self.refuse(digest, _explained(error, digest))

    def _leave_host(self, digest: str) -> None:
        if self.through is not None:
            self.through.host.leave(digest)

    def _is_free(self, header: TenantHeader) -> bool:
        """Whether nobody has to make room for the module, and nobody waits for room."""
        return not self._room.locked() and self._missing(self.arena.num_bytes(header)) <= 0

    def _reserve_free(self, header: TenantHeader, digest: str) -> Reservation:
        reservation = self.arena.reserve(header, digest) if self._is_free(header) else None
        if reservation is None:
            raise _NoRoom
        self._bytes.update(reservation.bytes_by_kind)
        return reservation

    async def _reserve(self, header: TenantHeader, digest: str) -> Reservation:
        need_bytes = self.arena.num_bytes(header)
        held_bytes = 0 if digest in self._held else sum(self._held.values())
        if need_bytes > self.budget_bytes - held_bytes:
            raise ModuleTooLarge(
                f"the module takes {need_bytes} bytes, module_budget_bytes is {self.budget_bytes}"
                f"{f' and pinned tenants hold {held_bytes}' if held_bytes else ''}; raise the budget"
            )
        if not self.arena.can_hold(header):
            raise ModuleTooLarge(
                f"a slot of the module does not fit into the {self.budget_bytes} bytes of module_budget_bytes; raise it"
            )
        async with self._room:
            while True:
                if self._make_room(need_bytes):
                    if (reservation := self.arena.reserve(header, digest)) is not None:
                        self._bytes.update(reservation.bytes_by_kind)
                        return reservation
                    if self._make_way(header):
                        continue
                if not self._retire(need_bytes, header):
                    if not self._may_change(digest):
                        raise ModuleTooLarge(f"{need_bytes} bytes find no place beside pinned tenants; pin fewer")
                    self._changed.clear()
                    await self._changed.wait()

    def _may_change(self, digest: str) -> bool:
        """Whether there is anything in memory, or on its way, that may still go."""
        going = any(other != digest for other in self._loading)
        return going or any(entry.pins or other not in self._held for other, entry in self._resident.items())

    def _make_room(self, need_bytes: int) -> bool:
        """Evict what nobody uses until so many bytes are free; nothing when that is not enough."""
        victims = self.policy.victims(self._missing(need_bytes), self._is_pinned)
        for digest in victims or ():
            self._evict(digest)
        return victims is not None

    def _make_way(self, header: TenantHeader) -> bool:
        """There are bytes enough, but no slot of the right size."""
        rivals = make_way(self.policy, *self.arena.rivals(header), self._is_pinned)
        for digest in rivals or ():
            self._evict(digest)
        return bool(rivals)

    def _retire(self, need_bytes: int, header: TenantHeader) -> bool:
        """Choose again among the modules in use, and let go of those chosen. Whether one of them went at once."""
        if (missing := self._missing(need_bytes)) > 0:
            victims = self.policy.victims(missing, self._is_awaited)
        else:
            victims = make_way(self.policy, *self.arena.rivals(header), self._is_awaited)
        return any([self._let_go(digest) for digest in victims or ()])

    def _let_go(self, digest: str) -> bool:
        """The module takes part in no new batch, and goes with the last one that uses it. Whether it went now."""
        entry = self._resident[digest]
        if not entry.pins:
            self._evict(digest)
        elif not entry.leaving:
            entry.leaving = True
            self.listener.left(digest)
        return not entry.pins

    def _missing(self, need_bytes: int) -> int:
        return need_bytes - (self.budget_bytes - self._bytes.total())

    def _is_awaited(self, digest: str) -> bool:
        """Loaded for requests that have not run yet, or on its way, or held."""
        entry = self._resident.get(digest)
        return entry is None or digest in self._held or (not entry.ran and self.listener.waits_for(digest))

    def _is_pinned(self, digest: str) -> bool:
        return self._is_awaited(digest) or self._resident[digest].pins > 0

    def _evict(self, digest: str) -> None:
        self._release(self._resident.pop(digest).tenant.reservation)
        if self.through is not None:
            self.through.forget(digest)
        self.policy.left(digest)
        self.metrics.evictions += 1
        self.listener.left(digest)

    def _release(self, reservation: Reservation) -> None:
        self.arena.release(reservation)
        self._bytes.subtract(reservation.bytes_by_kind)


def _explained(error: Exception, digest: str) -> VbertError:
    if isinstance(error, VbertError):
        return error
    _log.error("loading module %s failed", digest[:12], exc_info=error)
    if isinstance(error, OSError):
        return CorruptFile(f"the stored file of {digest[:12]} cannot be read ({error.strerror}); add the tenant again")
    return ComputeFailed(f"loading module {digest[:12]} failed: {error!r}; see the log of the server")
