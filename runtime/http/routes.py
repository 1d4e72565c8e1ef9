"""The route table: every path with its method, who may call it, what it takes and what it answers.

aiohttp's routes, the checks before a handler, /openapi.json and the tests that walk all routes are made from it.
`scopes` has no default: a route that forgets to say who may call it does not exist.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from aiohttp import web
from pydantic import BaseModel

from runtime.http import answers, bodies, health, inference, tenants
from runtime.http.auth import ADMIN, INFER, METRICS, SCOPES
from runtime.http.call import Call

__all__ = ["PUBLIC", "ROUTES", "Route"]

PUBLIC: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Route:
    """scopes: a key with any of them may call; PUBLIC: no key is asked for. answers: status -> shape, None for text.

    body: the JSON it takes; upload: it takes a tenant file instead. conditional: it honours If-Match and
    If-None-Match. while_draining: it is answered during a stop, too.
    """

    method: str
    path: str
    summary: str
    scopes: frozenset[str]
    handler: Callable[[Call], Awaitable[web.Response]]
    answers: Mapping[int, type[BaseModel] | None]
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    upload: bool = False
    conditional: bool = False
    while_draining: bool = False

    @property
    def infers(self) -> bool:
        return self.body is not None and issubclass(self.body, bodies.InferBody)

    @property
    def names_tenant(self) -> bool:
        return self.infers or "{id}" in self.path


_INFER = frozenset({INFER})
_ADMIN = frozenset({ADMIN})
_MODELS = frozenset({INFER, ADMIN})
_METRICS = frozenset({METRICS, ADMIN})
_ANY = frozenset(SCOPES)
_MODEL = {200: answers.ModelAnswer}
_MODEL_LIST = {200: answers.ModelsAnswer}
_TENANT = {200: answers.TenantAnswer}
_TENANT_LIST = {200: answers.TenantsAnswer}
_STORED = {200: answers.TenantAnswer, 201: answers.TenantAnswer}
_VERSIONS = {200: answers.VersionsAnswer}
_READY = {200: answers.ReadyAnswer, 503: answers.ReadyAnswer}
_PAGE = bodies.PageQuery


def _infer(
    name: str,
    summary: str,
    handler: Callable[[Call], Awaitable[web.Response]],
    body: type[bodies.InferBody],
    answer: type[BaseModel],
) -> Route:
    return Route("POST", f"/v1/{name}", summary, _INFER, handler, {200: answer}, body=body)


# fmt: off
ROUTES = (
    _infer("embeddings", "Embed texts", inference.embeddings, bodies.EmbeddingsBody, answers.EmbeddingsAnswer),
    _infer("classify", "Classify texts and pairs", inference.classify, bodies.ClassifyBody, answers.ClassifyAnswer),
    _infer("token_classify", "Find labelled spans", inference.token_classify,
           bodies.TokenClassifyBody, answers.TokenClassifyAnswer),
    _infer("rerank", "Order documents by relevance", inference.rerank, bodies.RerankBody, answers.RerankAnswer),
    _infer("score", "Score pairs of texts", inference.score, bodies.ScoreBody, answers.ScoreAnswer),

    Route("GET", "/v1/models", "List backbone and tenants", _MODELS, tenants.list_models, _MODEL_LIST, query=_PAGE),
    Route("GET", "/v1/models/{id}", "Show the backbone or a tenant", _MODELS, tenants.get_model, _MODEL),

    Route("GET", "/v1/tenants", "List the tenants", _ADMIN, tenants.list_tenants, _TENANT_LIST, query=_PAGE),
    Route("GET", "/v1/tenants/{id}", "Show a tenant's active version", _ADMIN, tenants.get_tenant, _TENANT),
    Route("PUT", "/v1/tenants/{id}", "Store a native tenant file as the active version", _ADMIN, tenants.put_tenant,
          _STORED, upload=True, conditional=True),
    Route("DELETE", "/v1/tenants/{id}", "Remove a tenant with all its versions", _ADMIN, tenants.delete_tenant,
          {200: answers.DeletedAnswer}, conditional=True),
    Route("GET", "/v1/tenants/{id}/versions", "List a tenant's versions", _ADMIN, tenants.list_versions, _VERSIONS),
    Route("POST", "/v1/tenants/{id}/activate", "Make a stored version the active one", _ADMIN, tenants.activate,
          _TENANT, body=bodies.ActivateBody, conditional=True),
    Route("POST", "/v1/tenants/{id}/rollback", "Make the version active that was so before", _ADMIN, tenants.rollback,
          _TENANT, conditional=True),
    Route("POST", "/v1/tenants/{id}/prefetch", "Bring a tenant's module into memory, if there is room", _ADMIN,
          tenants.prefetch, {200: answers.PrefetchAnswer}),

    Route("GET", "/health/live", "Is the process alive", PUBLIC, health.live, {200: answers.LiveAnswer},
          while_draining=True),
    Route("GET", "/health/ready", "Should it get requests", PUBLIC, health.ready, _READY, while_draining=True),
    Route("GET", "/metrics", "Prometheus metrics", _METRICS, health.metrics, {200: None}, while_draining=True),
    Route("GET", "/openapi.json", "This document", _ANY, health.openapi, {200: answers.OpenApiAnswer},
          while_draining=True),
)
# fmt: on
