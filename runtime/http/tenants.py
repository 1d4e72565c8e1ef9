"""Tenants as a resource with versions, and the OpenAI list of models. A key sees only the tenants it is bound to.

The version of the active file is the ETag: `If-Match: "3"` makes a change conditional, `If-None-Match: *` demands
that there be no such tenant yet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from runtime.http.bodies import ActivateBody, PageQuery
from runtime.http.call import Call, json_response
from runtime.http.errors import InvalidValue
from runtime.versions import TenantVersion

__all__ = [
    "activate",
    "delete_tenant",
    "get_model",
    "get_tenant",
    "list_models",
    "list_tenants",
    "list_versions",
    "prefetch",
    "put_tenant",
    "rollback",
]

_ETAG = re.compile(r'"([1-9][0-9]{0,17})"')
_PAGE = 1000


async def put_tenant(call: Call) -> web.Response:
    """The body is a native tenant file. 201: a new version; 200: the tenant has these bytes already."""
    version, created = await call.engine.put_tenant(call.tenant, call.body, if_match=await _if_match(call))
    return _resource(version, status=201 if created else 200)


async def get_tenant(call: Call) -> web.Response:
    return _resource(await call.engine.get_tenant(call.tenant))


async def delete_tenant(call: Call) -> web.Response:
    await call.engine.remove_tenant(call.tenant, if_match=await _if_match(call))
    return json_response({"object": "tenant.deleted", "id": call.tenant, "deleted": True})


async def list_tenants(call: Call) -> web.Response:
    found, has_more = await _visible(call)
    return json_response({"object": "list", "data": [_fields(version) for version in found], "has_more": has_more})


async def list_versions(call: Call) -> web.Response:
    versions = await call.engine.versions(call.tenant)
    return json_response({"object": "list", "data": [_fields(version) for version in versions]})


async def activate(call: Call) -> web.Response:
    body: ActivateBody = call.body
    return _resource(await call.engine.activate(call.tenant, body.version, if_match=await _if_match(call)))


async def rollback(call: Call) -> web.Response:
    return _resource(await call.engine.rollback(call.tenant, if_match=await _if_match(call)))


async def prefetch(call: Call) -> web.Response:
    """Answers when the module is in memory, or found no room that nobody uses."""
    here = await call.engine.prefetch([call.tenant])
    return json_response({"object": "tenant.prefetch", "id": call.tenant, "resident": here[call.tenant]})


async def list_models(call: Call) -> web.Response:
    """The backbone stands first, on the first page; then the tenants by id."""
    found, has_more = await _visible(call)
    backbone = call.engine.name
    data = [_model(call, version.tenant, version.created_s) for version in found]
    if not call.query.after and call.key.sees(backbone):
        data.insert(0, _model(call, backbone, call.state.started_s))
    return json_response({"object": "list", "data": data, "has_more": has_more})


async def get_model(call: Call) -> web.Response:
    if call.tenant == call.engine.name:
        return json_response(_model(call, call.tenant, call.state.started_s))
    version = await call.engine.get_tenant(call.tenant)
    return json_response(_model(call, version.tenant, version.created_s))


async def _visible(call: Call) -> tuple[list[TenantVersion], bool]:
    """One page of the tenants the key sees, read in pieces; and whether there are more."""
    query: PageQuery = call.query
    found: list[TenantVersion] = []
    after = query.after
    while query.limit is None or len(found) <= query.limit:
        piece = await call.engine.list_tenants(after=after, limit=_PAGE)
        found += [version for version in piece if call.key.sees(version.tenant)]
        if len(piece) < _PAGE:
            break
        after = piece[-1].tenant
    return found[: query.limit], query.limit is not None and len(found) > query.limit


def _model(call: Call, name: str, created_s: float) -> dict[str, Any]:
    backbone = call.engine.name
    return {
        "id": name,
        "object": "model",
        "created": int(created_s),
        "owned_by": "vbert",
        "root": backbone,
        "parent": None if name == backbone else backbone,
    }


def _fields(version: TenantVersion) -> dict[str, Any]:
    return {
        "object": "tenant",
        "id": version.tenant,
        "version": version.version,
        "active": version.active,
        "created": int(version.created_s),
        "digest": version.digest,
        "num_bytes": version.num_bytes,
        "fingerprint": version.fingerprint,
        "task": version.task,
        "problem": version.problem,
        "labels": version.labels,
        "max_length": version.max_length,
        "kinds": version.kinds,
        "paths": version.paths,
        "skip_fingerprint": version.skip_fingerprint,
        "exits": version.exits,
        "exit_threshold": version.exit_threshold,
        "source": version.source,
    }


def _resource(version: TenantVersion, *, status: int = 200) -> web.Response:
    return json_response(_fields(version), status=status, headers={"ETag": f'"{version.version}"'})


async def _if_match(call: Call) -> int | None:
    """The active version a change depends on: 0 for none, None for no condition. Raises InvalidValue."""
    headers: Mapping[str, str] = call.headers
    if (absent := headers.get("If-None-Match")) is not None:
        if absent.strip() != "*" or "If-Match" in headers:
            raise InvalidValue(
                f"If-None-Match is {absent[:80]!r}; only * is known, without If-Match", param="If-None-Match"
            )
        return 0
    condition = headers.get("If-Match")
    if condition is None:
        return None
    if condition.strip() == "*":
        return (await call.engine.get_tenant(call.tenant)).version
    etag = _ETAG.fullmatch(condition.strip())
    if etag is None:
        raise InvalidValue(f'If-Match is {condition[:80]!r}; give one ETag such as "3", or *', param="If-Match")
    return int(etag[1])
