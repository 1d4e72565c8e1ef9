"""The way of every request: key, scope, tenant, limits, body, handler; and of every error: one shape, one request id.

Nothing reaches a handler but through `endpoint`, and whether a key is needed is decided by the matched route alone.
A request that matches no route needs a key as well, so a stranger cannot tell which paths exist.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from secrets import token_hex
from typing import Any

from aiohttp import hdrs, web

from runtime.http.auth import ANONYMOUS, Key, check_local
from runtime.http.bodies import parse_json, parse_query
from runtime.http.call import STATE, Call, ServerState
from runtime.http.errors import MethodNotAllowed, UnknownRoute, error_response, status_of
from runtime.http.reading import JSON, OCTETS, check_media, leave_expectation, read_body
from runtime.http.routes import ROUTES, Route
from vbert.errors import VbertError

__all__ = ["add_routes", "answer_errors", "set_server_header"]

_log = logging.getLogger("vbert.http")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_INLINE_BYTES = 128 * 1024  # of JSON, read on the event loop: at most 5 ms, where all of it is short numbers
_ROUTE = web.RequestKey("ROUTE", str)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def add_routes(app: web.Application) -> None:
    """aiohttp's routes, one for each of the table; what answers GET answers HEAD, as load balancers ask."""
    for route in ROUTES:
        for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
            app.router.add_route(method, route.path, partial(endpoint, route), expect_handler=leave_expectation)


async def endpoint(route: Route, request: web.Request) -> web.Response:
    """Everything before a handler, cheapest and most protective first; then the handler."""
    request[_ROUTE] = route.path
    state = request.app[STATE]
    key = _authorise(route, state, request)
    async with nullcontext() if route.while_draining else state.admitted(upload=route.upload):
        tenant = request.match_info.get("id", "")
        if tenant:
            key.check_tenant(tenant)
        query = parse_query(route.query, dict(request.query)) if route.query else None
        body = await _body(route, state, request)
        if route.infers:
            key.check_tenant(body.model, param="model")
        call = Call(state=state, key=key, tenant=tenant, query=query, body=body, headers=request.headers)
        return await route.handler(call)


def _authorise(route: Route, state: ServerState, request: web.Request) -> Key:
    if not route.scopes:
        return ANONYMOUS
    if state.keys.is_open:
        check_local(request.headers)
    key = state.keys.authenticate(request.headers.get(hdrs.AUTHORIZATION))
    key.check_scope(route.scopes)
    return key


async def _body(route: Route, state: ServerState, request: web.Request) -> Any:
    limits = state.config
    if route.upload:
        check_media(request, OCTETS)
        max_bytes = state.engine.config.max_module_bytes
        return await read_body(request, max_bytes=max_bytes, timeout_s=limits.upload_timeout_s)
    if route.body is None:
        return None
    check_media(request, JSON)
    data = await read_body(request, max_bytes=limits.max_body_bytes, timeout_s=limits.read_timeout_s)
    if len(data) <= _INLINE_BYTES:
        return parse_json(route.body, data)
    async with state.large_bodies:
        return await asyncio.to_thread(parse_json, route.body, data)


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns whatever was raised into an answer, counts it, and names the request."""
    began_s = asyncio.get_running_loop().time()
    request_id = _request_id(request)
    try:
        response = await handler(request)
    except web.HTTPException as error:
        response = error_response(_unmatched(request, error), request_id)
    except VbertError as error:
        if status_of(error) == 500:
            _log.exception("request %s failed: %s", request_id, error.message)
        response = error_response(error, request_id)
    except (ConnectionError, asyncio.CancelledError):
        raise  # the client left: nobody is there to be answered
    except Exception as error:
        # The boundary of the server: whatever it is must not end the process or tell the client more than that.
        _log.exception("request %s failed: %r", request_id, error)
        response = error_response(VbertError("internal error"), request_id)
    response.headers["X-Request-Id"] = request_id
    route = request.get(_ROUTE, "unknown")
    method = request.method if route != "unknown" else "other"
    seconds = asyncio.get_running_loop().time() - began_s
    request.app[STATE].metrics.observe(method, route, response.status, seconds)
    return response


def _request_id(request: web.Request) -> str:
    """The client's own, if it is one that may stand in a log."""
    given = request.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else token_hex(16)


def _unmatched(request: web.Request, error: web.HTTPException) -> VbertError:
    """aiohttp found no route (handlers raise no HTTPException). The key is asked for first."""
    try:
        request.app[STATE].keys.authenticate(request.headers.get(hdrs.AUTHORIZATION))
    except VbertError as refusal:
        return refusal
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowed(f"{request.method} is not for this path; use {allowed}", headers={"Allow": allowed})
    if isinstance(error, web.HTTPNotFound):
        return UnknownRoute(f"{request.path[:160]!r} is no route; /openapi.json lists all")
    raise error


async def set_server_header(request: web.Request, response: web.StreamResponse) -> None:
    """aiohttp would name its own and Python's versions to everybody."""
    response.headers[hdrs.SERVER] = "vbert"
