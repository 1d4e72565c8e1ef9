"""`Engine`: many tenants on one backbone, in process. Owns start and stop, and creates every task.

async with Engine(EngineConfig(backbone="FOLDER", store="DIR")) as engine:
    result = await engine.classify("acme.intent", ["where is my card?"])
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from runtime import answers
from runtime.clock import Clock, MonotonicClock
from runtime.config import EngineConfig
from runtime.core import Core
from runtime.dispatcher import Terms
from runtime.errors import ComputeFailed, Draining
from runtime.health import Readiness
from runtime.inputs import as_pairs
from runtime.lanes import Lanes
from runtime.manager import typical_load_s
from runtime.metrics import MetricsSnapshot
from runtime.parts import Parts, load_parts
from runtime.pending import Pending
from runtime.policies.instances import INSTANCE_POLICIES
from runtime.policies.named import Instances, batch_policy
from runtime.request import ClassifyResult, EmbedResult, Input, RerankResult, ScoreResult, TokenClassifyResult
from runtime.scheduler import BatchPolicy
from runtime.versions import TenantVersion
from vbert.config import EncoderConfig
from vbert.errors import ConfigError

__all__ = ["Engine"]

_MANY_TOKENS = 8192  # more of them are turned into entities in a thread: about 10 ms of Python
_log = logging.getLogger(__name__)


class Engine:
    """Every method of a request raises what runtime/errors.py and vbert/errors.py name, nothing else.

    deadline_s: seconds after which the request is given up, EngineConfig.default_deadline_s if None. truncate: cut
    inputs that are too long instead of refusing them. path: how the inputs pass the lower layers, `plain`, `exact`,
    `compute`, `backoff` or `auto`, of those the tenant was trained for; None: as its tenant's rule says, else auto.
    caller: whose share of the queue is used.
    """

    def __init__(self, config: EngineConfig, *, clock: Clock | None = None, policy: BatchPolicy | None = None) -> None:
        self.config = config
        self._clock, self._policy = clock or MonotonicClock(), policy
        self._core: Core | None = None
        self._main: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # ---- what runs -------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The backbone's served name: an embedding tenant that is always there."""
        return self._running.parts.name

    @property
    def backbone(self) -> EncoderConfig:
        return self._running.parts.backbone.config

    @property
    def fingerprint(self) -> str:
        return self._running.parts.backbone.fingerprint

    @property
    def dtype(self) -> str:
        """float32 or bfloat16: what `auto` came to."""
        return str(self._running.parts.model.dtype).removeprefix("torch.")

    def ready(self) -> Readiness:
        """Whether requests are answered. Computes nothing."""
        if self._core is None:
            reason = "not started" if self._stopping is None else "stopped"
            return Readiness(ready=False, reasons=(reason,), canary={}, watchdog={})
        return self._core.health.report(self._core.dispatcher.refusal)

    def snapshot(self) -> MetricsSnapshot:
        return self._running.snapshot()

    # ---- requests --------------------------------------------------------------------------------------------------

    async def embed(
        self,
        tenant: str,
        inputs: Sequence[Input],
        *,
        deadline_s: float | None = None,
        truncate: bool = False,
        path: str | None = None,
        priority: str = "interactive",
        caller: str = "local",
    ) -> EmbedResult:
        """Embeddings [N, D] of texts, pairs or lists of token ids; of the backbone itself under its own name."""
        done = await self._submit(
            "embed",
            tenant,
            inputs,
            Terms(deadline_s=deadline_s, truncate=truncate, path=path, priority=priority, caller=caller),
        )
        return answers.embed_result(done)

    async def classify(
        self,
        tenant: str,
        inputs: Sequence[Input],
        *,
        deadline_s: float | None = None,
        truncate: bool = False,
        path: str | None = None,
        exit_threshold: float | None = None,
        priority: str = "interactive",
        caller: str = "local",
    ) -> ClassifyResult:
        """Labels and probabilities [N, C] of texts or pairs."""
        terms = Terms(
            deadline_s=deadline_s,
            truncate=truncate,
            path=path,
            exit_threshold=exit_threshold,
            priority=priority,
            caller=caller,
        )
        done = await self._submit("classify", tenant, inputs, terms)
        return answers.classify_result(done)

    async def token_classify(
        self,
        tenant: str,
        inputs: Sequence[Input],
        *,
        deadline_s: float | None = None,
        truncate: bool = False,
        path: str | None = None,
        priority: str = "interactive",
        caller: str = "local",
    ) -> TokenClassifyResult:
        """Entities of each text, in code points, or of each list of words, in words."""
        done = await self._submit(
            "token_classify",
            tenant,
            inputs,
            Terms(deadline_s=deadline_s, truncate=truncate, path=path, priority=priority, caller=caller),
        )
        if sum(len(e.token_ids) for e in done.encoded) <= _MANY_TOKENS:
            return answers.token_classify_result(done)
        lane = self._running.lanes.tokenizer
        return await asyncio.get_running_loop().run_in_executor(lane, answers.token_classify_result, done)

    async def rerank(
        self,
        tenant: str,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        deadline_s: float | None = None,
        truncate: bool = False,
        path: str | None = None,
        priority: str = "interactive",
        caller: str = "local",
    ) -> RerankResult:
        """How relevant each document is to the query, and the order of the best `top_n`."""
        limit = answers.check_top_n(top_n)
        done = await self._submit(
            "rerank",
            tenant,
            as_pairs(query, documents),
            Terms(deadline_s=deadline_s, truncate=truncate, path=path, priority=priority, caller=caller),
        )
        return answers.rerank_result(done, limit)

    async def score(
        self,
        tenant: str,
        pairs: Sequence[tuple[str, str]],
        *,
        deadline_s: float | None = None,
        truncate: bool = False,
        path: str | None = None,
        priority: str = "interactive",
        caller: str = "local",
    ) -> ScoreResult:
        """One score a pair of texts."""
        done = await self._submit(
            "score",
            tenant,
            pairs,
            Terms(deadline_s=deadline_s, truncate=truncate, path=path, priority=priority, caller=caller),
        )
        return answers.score_result(done)

    # ---- tenants ---------------------------------------------------------------------------------------------------

    async def add_tenant(
        self,
        tenant: str,
        source: str | os.PathLike[str] | bytes,
        *,
        activate: bool = True,
        if_match: int | None = None,
        task: str | None = None,
    ) -> TenantVersion:
        """Register a checkpoint folder of any readable format, a native file, or its bytes, as a new version.

        task: a head kind, where a folder leaves open what it is for.
        """
        tenants = self._running.tenants
        return (await tenants.add(tenant, source, activate=activate, if_match=if_match, task=task))[0]

    async def put_tenant(self, tenant: str, data: bytes, *, if_match: int | None = None) -> tuple[TenantVersion, bool]:
        """Register a native file's bytes and serve it; returns the version and whether it is new."""
        return await self._running.tenants.add(tenant, data, activate=True, if_match=if_match)

    async def remove_tenant(self, tenant: str, *, if_match: int | None = None) -> None:
        """Forget every version. Requests admitted before are still answered with the version they were admitted for."""
        await self._running.tenants.remove(tenant, if_match=if_match)
        await self._running.collect_garbage()

    async def list_tenants(self, *, after: str = "", limit: int = 1000) -> list[TenantVersion]:
        """Active versions of the tenants whose id sorts after `after`."""
        return await self._running.tenants.run(self._running.parts.store.list, after, limit)

    async def get_tenant(self, tenant: str) -> TenantVersion:
        """The active version."""
        return await self._running.tenants.run(self._running.parts.store.get, tenant)

    async def versions(self, tenant: str) -> list[TenantVersion]:
        return await self._running.tenants.run(self._running.parts.store.versions, tenant)

    async def activate(self, tenant: str, version: int, *, if_match: int | None = None) -> TenantVersion:
        """Serve that version from the next request on."""
        activate = partial(self._running.parts.store.activate, if_match=if_match)
        return await self._running.tenants.run(activate, tenant, version)

    async def rollback(self, tenant: str, *, if_match: int | None = None) -> TenantVersion:
        """Serve the version that was active before the present one."""
        rollback = partial(self._running.parts.store.rollback, if_match=if_match)
        return await self._running.tenants.run(rollback, tenant)

    async def prefetch(self, tenants: Iterable[str]) -> dict[str, bool]:
        """Bring modules into memory before requests ask for them, as far as there is room that nobody uses.

        Returns for each tenant whether it is in memory now. Raises UnknownTenant.
        """
        return await self._running.prefetch(tenants)

    # ---- start and stop --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the backbone and prove that it answers. Raises ConfigError, or what reading the backbone raises."""
        if self._main is not None:
            raise ConfigError("the engine was started before; make a new one")
        loop, lanes = asyncio.get_running_loop(), Lanes.open(self.config.compute_threads)
        try:
            parts = await loop.run_in_executor(lanes.compute, load_parts, self.config, self._clock)
        except BaseException:
            lanes.close()
            raise
        started: asyncio.Future[Core] = loop.create_future()
        self._main = asyncio.create_task(self._run(parts, lanes, started), name="vbert-engine")
        either: list[asyncio.Future[Any]] = [started, self._main]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            lanes.close()
            await asyncio.to_thread(parts.close)
            self._main.result()  # raises what went wrong
        self._core = core = started.result()
        self._main.add_done_callback(self._ended)
        try:
            await core.prove()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Admit nothing more, finish what was admitted (at most drain_timeout_s), end. May be called again."""
        if self._core is not None and self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(self._core), name="vbert-stop")
        if self._stopping is not None:
            await asyncio.shield(self._stopping)

    async def _run(self, parts: Parts, lanes: Lanes, started: asyncio.Future[Core]) -> None:
        """Parent of every task, until cancelled."""
        config = self.config
        policy = self._policy or batch_policy(
            config.policy, parts.cost, max_batch_tokens=config.max_batch_tokens, instances=_instances(config, parts)
        )
        async with asyncio.TaskGroup() as tasks:
            core = Core(config, parts, lanes, clock=self._clock, policy=policy, spawn=tasks.create_task)
            tasks.create_task(core.loop.run(), name="vbert-loop")
            tasks.create_task(core.health.watch_loop_lag(), name="vbert-loop-lag")
            tasks.create_task(core.learn(), name="vbert-ngrams")
            tasks.create_task(core.read_tables(), name="vbert-tables")
            started.set_result(core)
            await core.look_after()

    def _ended(self, main: asyncio.Task[None]) -> None:
        """A task of the engine raised: a bug. Nobody may wait for ever because of it."""
        if main.cancelled() or self._core is None or (error := main.exception()) is None:
            return
        _log.critical("the engine broke", exc_info=error)
        self._core.dispatcher.abandon(ComputeFailed(f"the engine broke ({error!r}); restart it and report the log"))

    async def _stop(self, core: Core) -> None:
        assert self._main is not None
        await core.dispatcher.drain(self.config.drain_timeout_s)
        self._main.cancel()
        await asyncio.wait([self._main])
        await core.collect_garbage()
        core.tenants.closed = True
        await asyncio.to_thread(core.lanes.close)
        await asyncio.to_thread(core.parts.close)
        self._core = None

    async def _submit(self, method: str, tenant: str, inputs: object, terms: Terms) -> Pending:
        return await self._running.dispatcher.submit(method, tenant, inputs, terms)

    @property
    def _running(self) -> Core:
        if self._core is not None:
            return self._core
        if self._stopping is not None:
            raise Draining("the engine has stopped; ask another one")
        raise ConfigError("the engine is not started; use `async with engine:` or `await engine.start()`")


def _instances(config: EngineConfig, parts: Parts) -> Instances:
    """Raises ConfigError where the budget has no room for them."""
    size = parts.model.encoder.num_bytes
    if config.policy in INSTANCE_POLICIES and config.instances * size > config.module_budget_bytes:
        raise ConfigError(
            f"instances is {config.instances}, each takes up to {size} bytes, and module_budget_bytes is "
            f"{config.module_budget_bytes}; raise it to {config.instances * size}, or give fewer instances"
        )
    load_s = (parts.cost.load_s if parts.cost else typical_load_s)(size)
    return Instances(count=config.instances, deadline_s=config.default_deadline_s, load_s=load_s)
