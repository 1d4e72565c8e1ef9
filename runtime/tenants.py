"""Tenants as a resource: import, register, switch, remove. Every file and catalogue access is off the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Set
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from runtime.blobs import digest_of
from runtime.config import EngineConfig
from runtime.errors import Draining, InvalidTenantId, ModuleTooLarge, RequestTooLarge
from runtime.lanes import Lanes
from runtime.registrar import Registrar
from runtime.store import TenantStore, check_tenant_id
from runtime.versions import ModuleFacts, TenantVersion, Upload
from vbert.arena import Arena
from vbert.formats.convert import check_native, to_native
from vbert.formats.transformers_folder import Backbone
from vbert.header import TenantHeader

__all__ = ["Tenants"]

T = TypeVar("T")
Source = str | os.PathLike[str] | bytes


@dataclass(kw_only=True, eq=False)
class Tenants:
    """`reserved`: the backbone's served name, which no tenant may take."""

    config: EngineConfig
    store: TenantStore
    backbone: Backbone
    arena: Arena
    lanes: Lanes
    reserved: str
    registrar: Registrar
    closed: bool = False

    async def add(
        self, tenant: str, source: Source, *, activate: bool, if_match: int | None, task: str | None = None
    ) -> tuple[TenantVersion, bool]:
        """Register a checkpoint folder, a native file, or a native file's bytes; returns it and whether it is new.

        `task`: a head kind, for folders that leave it open.

        Raises: InvalidTenantId, RefusedCheckpoint, CorruptFile, WrongBackbone, RequestTooLarge, ModuleTooLarge,
        StoreFull, VersionConflict.
        """
        check_tenant_id(tenant)
        if tenant == self.reserved:
            raise InvalidTenantId(f"{tenant!r} is the name of the backbone; choose another name", param="tenant")
        prepare = partial(self._upload, activate=activate, if_match=if_match, task=task)
        return await self.registrar.put(await self._run(self.lanes.imports, prepare, tenant, source))

    async def remove(self, tenant: str, *, if_match: int | None) -> None:
        """Forget a tenant. Requests already admitted are still answered; their files go when the last one is."""
        await self.run(partial(self.store.remove, if_match=if_match), tenant)

    async def collect(self, in_use: Callable[[], Set[str]]) -> Set[str]:
        """Delete files of tenants that were removed, here or by another process, but those in use. Returns the digests
        that nobody needs any more, deleted or not.

        `in_use` is asked after the garbage is known: nobody is admitted for it any more, so whoever needs it shows.
        """
        garbage = await self.run(self.store.garbage)
        if unused := garbage - in_use():
            await self.run(self.store.collect_garbage, unused)
        return unused

    async def run(self, method: Callable[..., T], *args: object) -> T:
        """A method of the store, on its thread."""
        return await self._run(self.lanes.store, method, *args)

    async def _run(self, lane: Executor, method: Callable[..., T], *args: object) -> T:
        """One job in one thread: what has begun is finished also when the engine stops."""
        if self.closed:
            raise Draining("the server is stopping and changes no tenants; ask another one")
        return await asyncio.get_running_loop().run_in_executor(lane, method, *args)

    def _upload(self, tenant: str, source: Source, *, activate: bool, if_match: int | None, task: str | None) -> Upload:
        data = source if isinstance(source, bytes) else self._native(Path(source), task)
        facts, digest = self._checked(data), digest_of(data)
        return Upload(tenant=tenant, data=data, facts=facts, activate=activate, if_match=if_match, digest=digest)

    def _native(self, path: Path, task: str | None) -> bytes:
        return to_native(path, self.backbone, task=task, dtype=self.config.store_dtype)

    def _checked(self, data: bytes) -> ModuleFacts:
        """What the catalogue keeps of a native file that is whole and fits this engine."""
        limit = self.config.max_module_bytes
        if len(data) > limit:
            raise RequestTooLarge(f"the tenant file has {len(data)} bytes, the limit is {limit}; use a smaller module")
        header = check_native(data, self.backbone)
        self._check_room(header)
        return ModuleFacts.of(header)

    def _check_room(self, header: TenantHeader) -> None:
        needed, budget = self.arena.num_bytes(header), self.config.module_budget_bytes
        if needed > budget:
            raise ModuleTooLarge(
                f"the module needs {needed} bytes, module_budget_bytes is {budget}; raise it or use a smaller one"
            )
