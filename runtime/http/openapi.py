"""/openapi.json, made from the route table and the bodies, so that it says what the server does and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from pydantic_core import to_json

from runtime.config import EngineConfig
from runtime.http.answers import ErrorAnswer
from runtime.http.config import HttpConfig
from runtime.http.errors import ERROR_TYPES
from runtime.http.reading import JSON, OCTETS
from runtime.http.routes import ROUTES, Route

__all__ = ["openapi_document"]

_TEXT = "text/plain"
_REF = "#/components/schemas/{model}"
_TENANT_ID = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"}
_RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds, rounded up"}}
_ETAG = {"ETag": {"schema": {"type": "string"}, "description": "the active version, quoted"}}
_CONDITIONS = (
    ("If-Match", r'^("[1-9][0-9]{0,17}"|\*)$', 'the ETag that must be the active version, such as "3", or * for any'),
    ("If-None-Match", r"^\*$", "* to demand that there be no such tenant yet"),
)
_LIMITS = ("max_request_inputs", "max_input_chars", "max_module_bytes", "max_queue_inputs", "default_deadline_s")
_HTTP_LIMITS = ("max_body_bytes", "max_header_bytes", "max_headers", "read_timeout_s", "upload_timeout_s")


def openapi_document(engine_config: EngineConfig, http_config: HttpConfig, *, keys: bool, version: str) -> bytes:
    """The document of one server, as JSON. keys: whether the server asks for them."""
    _, definitions = models_json_schema([(model, "validation") for model in _models()], ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, keys)
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    limits = {name: getattr(engine_config, name) for name in _LIMITS}
    limits |= {name: getattr(http_config, name) for name in _HTTP_LIMITS}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "vbert", "version": version, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "paths": paths,
        "components": components,
        "x-limits": limits,
    }
    return to_json(document)


def _models() -> list[type[BaseModel]]:
    """Every model of the table, once, in its order. A query's fields stand with its route instead."""
    found: dict[type[BaseModel], None] = {ErrorAnswer: None}
    for route in ROUTES:
        for model in (route.body, *route.answers.values()):
            if model is not None:
                found[model] = None
    return list(found)


def _operation(route: Route, keys: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "summary": route.summary,
        "parameters": list(_parameters(route)),
        "responses": _responses(route, keys),
    }
    if route.upload:
        content = {OCTETS: {"schema": {"type": "string", "format": "binary"}}}
        operation["requestBody"] = {"required": True, "content": content}
    elif route.body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": _reference(route.body)}}}
    if keys and route.scopes:
        operation["security"] = [{"key": []}]
        operation["description"] = f"Needs a key with scope {' or '.join(sorted(route.scopes))}."
    return operation


def _parameters(route: Route) -> Iterator[dict[str, Any]]:
    if "{id}" in route.path:
        schema = {"type": "string"} if route.path.startswith("/v1/models") else _TENANT_ID
        yield {"name": "id", "in": "path", "required": True, "schema": schema}
    if route.query is not None:
        for name, schema in route.query.model_json_schema()["properties"].items():
            yield {"name": name, "in": "query", "required": False, "schema": schema}
    if route.conditional:
        for name, pattern, text in _CONDITIONS:
            schema = {"type": "string", "pattern": pattern}
            yield {"name": name, "in": "header", "required": False, "schema": schema, "description": text}


def _responses(route: Route, keys: bool) -> dict[str, Any]:
    responses = {}
    for status, model in route.answers.items():
        media = {_TEXT: {"schema": {"type": "string"}}} if model is None else {JSON: {"schema": _reference(model)}}
        responses[str(status)] = {"description": "the answer", "content": media}
        if model is not None and model.__name__ == "TenantAnswer":
            responses[str(status)]["headers"] = _ETAG
    for status in _failures(route, keys):
        if str(status) not in responses:
            responses[str(status)] = {
                "description": ERROR_TYPES[status],
                "content": {JSON: {"schema": _reference(ErrorAnswer)}},
                **({"headers": _RETRY_AFTER} if status in (429, 503) else {}),
            }
    return responses


def _failures(route: Route, keys: bool) -> list[int]:
    """Statuses a route may fail with, from what it takes and does."""
    statuses = {400, 500}  # 400: a request that is not HTTP
    if route.scopes:
        statuses |= {401, 403} if keys else {403}
    if not route.while_draining:
        statuses.add(503)
    if route.names_tenant:
        statuses |= {404, 422}
    if route.query is not None:
        statuses.add(422)
    if route.body is not None or route.upload:
        statuses |= {408, 413, 415, 422}
    if route.infers:
        statuses |= {429, 504}
    if route.conditional:
        statuses.add(409)
    if route.infers or route.upload:
        statuses.add(507)
    return sorted(statuses)


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}
