"""`BlockingEngine`: the methods of `Engine` for scripts and notebooks, blocking, from any number of threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from functools import update_wrapper
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.health import Readiness
from runtime.metrics import MetricsSnapshot
from runtime.scheduler import BatchPolicy
from vbert.config import EncoderConfig

__all__ = ["BlockingEngine"]

P = ParamSpec("P")
R = TypeVar("R")


def _blocking(
    method: Callable[Concatenate[Engine, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[BlockingEngine, P], R]:
    """The same method, waited for in the calling thread. Interrupting the wait cancels the request."""

    def call(self: BlockingEngine, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._wait_for(method(self._engine, *args, **kwargs))

    update_wrapper(call, method)
    return call


class BlockingEngine:
    """Runs an `Engine` on an event loop of its own, in a thread of its own.

    with BlockingEngine(EngineConfig(backbone="FOLDER", store="DIR")) as engine:
        engine.classify("acme.intent", ["where is my card?"]).labels
    """

    def __init__(self, config: EngineConfig, *, policy: BatchPolicy | None = None) -> None:
        self._engine = Engine(config, policy=policy)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vbert-event-loop", daemon=True)

    def start(self) -> None:
        """Raises what Engine.start raises."""
        self._thread.start()
        try:
            self._wait_for(self._engine.start())
        except BaseException:
            self._end_loop()
            raise

    def stop(self) -> None:
        """Drain and end. May be called again."""
        if self._thread.is_alive():
            self._wait_for(self._engine.stop())
            self._end_loop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def config(self) -> EngineConfig:
        return self._engine.config

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def backbone(self) -> EncoderConfig:
        return self._engine.backbone

    @property
    def fingerprint(self) -> str:
        return self._engine.fingerprint

    @property
    def dtype(self) -> str:
        return self._engine.dtype

    def ready(self) -> Readiness:
        return self._engine.ready()

    def snapshot(self) -> MetricsSnapshot:
        """Taken on the event loop, so that no counter moves while it is read."""

        async def snapshot() -> MetricsSnapshot:
            return self._engine.snapshot()

        return self._wait_for(snapshot())

    embed = _blocking(Engine.embed)
    classify = _blocking(Engine.classify)
    token_classify = _blocking(Engine.token_classify)
    rerank = _blocking(Engine.rerank)
    score = _blocking(Engine.score)
    add_tenant = _blocking(Engine.add_tenant)
    put_tenant = _blocking(Engine.put_tenant)
    remove_tenant = _blocking(Engine.remove_tenant)
    list_tenants = _blocking(Engine.list_tenants)
    get_tenant = _blocking(Engine.get_tenant)
    versions = _blocking(Engine.versions)
    activate = _blocking(Engine.activate)
    rollback = _blocking(Engine.rollback)
    prefetch = _blocking(Engine.prefetch)

    def _wait_for(self, work: Coroutine[Any, Any, R]) -> R:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
