"""Connections: their limits and time-outs, and JSON also for what is not HTTP at all."""

from __future__ import annotations

import logging
from secrets import token_hex

from aiohttp import web

from runtime.http.config import HttpConfig
from runtime.http.errors import MalformedBody, error_response
from vbert.errors import VbertError

__all__ = ["json_protocol", "make_runner"]

_log = logging.getLogger("vbert.http")


class _JsonProtocol(web.RequestHandler):
    """aiohttp's connection, but for the text it answers to a head that cannot be parsed."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        request_id = token_hex(16)
        if status == 400:
            error: VbertError = MalformedBody(
                "the request is not HTTP/1.1, or its head is too large; see /openapi.json"
            )
        else:
            _log.error("request %s failed outside its handler", request_id, exc_info=exc)
            error = VbertError("internal error")
        response = error_response(error, request_id)
        response.headers.update({"X-Request-Id": request_id, "Server": "vbert"})
        response.force_close()
        return response


def json_protocol(runner: web.AppRunner) -> web.RequestHandler:
    """The protocol of one new connection, for `loop.create_server`."""
    server = runner.server
    assert server is not None, "runner.setup() comes first"
    protocol = server()
    protocol.__class__ = _JsonProtocol  # aiohttp has no hook for the class; without slots of its own it may be swapped
    return protocol


def make_runner(app: web.Application, config: HttpConfig, *, shutdown_timeout_s: float) -> web.AppRunner:
    """A client that leaves cancels its handler, and that the request in the engine. Bodies are never decompressed.

    A head must be complete `keepalive_s` after the connection was opened, or after the answer before.
    """
    return web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        auto_decompress=False,
        keepalive_timeout=config.keepalive_s,
        lingering_time=5.0,  # seconds an unread body is read on, so that its sender sees the refusal
        max_line_size=config.max_header_bytes,
        max_field_size=config.max_header_bytes,
        max_headers=config.max_headers,
        shutdown_timeout=shutdown_timeout_s,
    )
