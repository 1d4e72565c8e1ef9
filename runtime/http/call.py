"""`ServerState`, what all requests share, and `Call`, one request that may be answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web
from pydantic_core import to_json

from runtime.errors import Draining
from runtime.http.auth import Key, KeyRing
from runtime.http.config import HttpConfig

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.http.metrics import HttpMetrics

__all__ = ["STATE", "Call", "ServerState", "json_response"]


@dataclass(kw_only=True, eq=False)
class ServerState:
    """One server. `draining`: nothing new is taken, `/health/ready` says so; `started_s`: Unix time."""

    engine: Engine
    config: HttpConfig
    keys: KeyRing
    metrics: HttpMetrics
    openapi: bytes
    started_s: int
    draining: bool = False
    _in_flight: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._upload_turns = asyncio.Semaphore(self.config.max_uploads)
        self.large_bodies = asyncio.Lock()  # one is parsed at a time: threads that compute keep the event loop waiting
        self._idle.set()

    @asynccontextmanager
    async def admitted(self, *, upload: bool) -> AsyncIterator[None]:
        """Counts a request that a stop must wait for; an upload waits for its turn to use memory. Raises Draining."""
        if self.draining:
            raise Draining("the server is stopping and takes no new requests; ask another one")
        self._in_flight += 1
        self.metrics.in_flight.set(self._in_flight)
        self._idle.clear()
        try:
            async with self._upload_turns if upload else nullcontext():
                yield
        finally:
            self._in_flight -= 1
            self.metrics.in_flight.set(self._in_flight)
            if not self._in_flight:
                self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new and wait for what was admitted. Returns whether all of it was answered in time."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


STATE = web.AppKey("STATE", ServerState)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request past its key, limits and checks. `body`: bytes of an upload, or what the route's model made of it."""

    state: ServerState
    key: Key
    tenant: str  # of the path, "" without one
    body: Any
    query: Any
    headers: Mapping[str, str]

    @property
    def engine(self) -> Engine:
        return self.state.engine


def json_response(content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """pydantic's encoder writes an answer of 64 x 384 numbers in 2 ms, where json takes 18."""
    return web.Response(body=to_json(content), status=status, content_type="application/json", headers=headers)
