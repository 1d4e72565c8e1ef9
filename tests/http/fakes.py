"""An engine that answers at once, waits or fails as told, for states that are hard to make; and a server around one."""

import asyncio
import json
from collections.abc import Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import numpy as np
from aiohttp import web

from runtime.config import EngineConfig
from runtime.http.answers import ErrorAnswer
from runtime.http.config import HttpConfig
from runtime.metrics import Metrics
from runtime.request import ClassifyResult, EmbedResult, RerankResult, ScoreResult, Timings, TokenClassifyResult
from runtime.versions import TenantVersion
from serve import accepting, bind, create_app
from vbert.errors import UnknownTenant

TIMINGS = Timings(tokenize_s=0.001, queue_s=0.002, load_s=0.003, compute_s=0.004, total_s=0.01)


@dataclass
class FakeReadiness:
    ready: bool = True
    reasons: tuple[str, ...] = ()
    canary: dict = field(default_factory=dict)
    watchdog: dict = field(default_factory=dict)


class FakeEngine:
    """`error`: raised by every call. `gate`: inference waits for it. `calls`: (method, tenant, keywords)."""

    def __init__(self, **config):
        self.config = EngineConfig(backbone="none", store="none", **config)
        self.name = "base"
        self.error = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls = []
        self.waiting = 0
        self.cancelled = asyncio.Event()
        self.readiness = FakeReadiness()
        self.width, self.value = 4, 0.5
        self.tenants = ["acme.a", "acme.b", "other"]

    async def _called(self, method, tenant, keywords):
        self.calls.append((method, tenant, keywords))
        self.waiting += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.waiting -= 1
        if self.error is not None:
            raise self.error
        if tenant not in (*self.tenants, self.name):
            raise UnknownTenant(f"no tenant {tenant!r}", param="model")

    def _common(self, tenant, count):
        return {
            "tenant": tenant,
            "version": 3,
            "timings": TIMINGS,
            "tokens": (5,) * count,
            "truncated": (False,) * count,
        }

    async def embed(self, tenant, inputs, **keywords):
        await self._called("embed", tenant, keywords | {"inputs": inputs})
        embeddings = np.full((len(inputs), self.width), self.value, np.float32)
        return EmbedResult(embeddings=embeddings, **self._common(tenant, len(inputs)))

    async def classify(self, tenant, inputs, **keywords):
        await self._called("classify", tenant, keywords | {"inputs": inputs})
        count = len(inputs)
        return ClassifyResult(
            labels=("yes",) * count,
            probabilities=np.tile(np.float32([0.75, 0.25]), (count, 1)),
            class_labels=("yes", "no"),
            problem="single_label",
            **self._common(tenant, count),
        )

    async def token_classify(self, tenant, inputs, **keywords):
        await self._called("token_classify", tenant, keywords | {"inputs": inputs})
        return TokenClassifyResult(entities=((),) * len(inputs), **self._common(tenant, len(inputs)))

    async def rerank(self, tenant, query, documents, **keywords):
        await self._called("rerank", tenant, keywords)
        count = len(documents)
        order = tuple(range(count))[: keywords["top_n"]]
        return RerankResult(scores=np.zeros(count, np.float32), order=order, **self._common(tenant, count))

    async def score(self, tenant, pairs, **keywords):
        await self._called("score", tenant, keywords | {"inputs": pairs})
        return ScoreResult(scores=np.zeros(len(pairs), np.float32), **self._common(tenant, len(pairs)))

    def _version(self, tenant, version=3):
        return TenantVersion(
            tenant=tenant,
            version=version,
            digest="d" * 64,
            num_bytes=10,
            created_s=1.5,
            active=True,
            fingerprint="sha256:f",
            task="classify",
            labels=("yes", "no"),
        )

    async def put_tenant(self, tenant, data, **keywords):
        await self._called("put_tenant", tenant, keywords | {"data": data})
        return self._version(tenant), True

    async def get_tenant(self, tenant):
        await self._called("get_tenant", tenant, {})
        return self._version(tenant)

    async def remove_tenant(self, tenant, **keywords):
        await self._called("remove_tenant", tenant, keywords)

    async def versions(self, tenant):
        await self._called("versions", tenant, {})
        return [self._version(tenant)]

    async def activate(self, tenant, version, **keywords):
        await self._called("activate", tenant, keywords)
        return self._version(tenant, version)

    async def rollback(self, tenant, **keywords):
        await self._called("rollback", tenant, keywords)
        return self._version(tenant, 2)

    async def prefetch(self, tenants):
        await self._called("prefetch", tenants[0], {})
        return {tenant: True for tenant in tenants}

    async def list_tenants(self, *, after="", limit=1000):
        return [self._version(tenant) for tenant in self.tenants if tenant > after][:limit]

    def ready(self):
        return self.readiness

    def snapshot(self):
        metrics = Metrics()
        metrics.observe_request(("low_rank", "sparse"), TIMINGS)
        metrics.loop_lag.observe(0.004)
        metrics.compute_threads = 2
        return metrics.snapshot(
            resident_bytes={"low_rank": 7},
            memory_bytes={"backbone": 9, "modules": 7},
            sequences={"hits": 3},
            ngrams={"trigrams": 5},
            resident_modules=1,
            module_budget_bytes=100,
            loading_modules=0,
            queue_inputs=self.waiting,
            queue_tokens=0,
            in_flight_batches=0,
            tokens_per_s=None,
        )


@dataclass
class Answer:
    status: int
    headers: Mapping
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def code(self):
        return ErrorAnswer.model_validate_json(self.body).error.code


@dataclass
class Client:
    """Real HTTP to one server."""

    app: web.Application
    url: str
    session: aiohttp.ClientSession

    async def ask(self, method, path, *, key=None, headers=None, **content):
        headers = dict(headers or {}) | ({"Authorization": f"Bearer {key}"} if key else {})
        async with self.session.request(method, self.url + path, headers=headers, **content) as answer:
            return Answer(answer.status, answer.headers, await answer.read())


@asynccontextmanager
async def served(engine, **config):
    """A client of a server on a free loopback port."""
    http_config = HttpConfig(port=0, **config)
    app = create_app(engine, http_config)
    with bind(http_config) as listening:
        async with accepting(app, listening) as url, aiohttp.ClientSession() as session:
            yield Client(app, url, session)
