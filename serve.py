"""HTTP in front of the runtime: `create_app(engine, config)`, `run(...)`, `python serve.py`. Parts: runtime/http/."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import uvloop
from aiohttp import web

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.flags import ENVIRONMENT_HELP, add_flags, given
from runtime.http.answering import add_routes, answer_errors, set_server_header
from runtime.http.auth import KeyRing, make_key
from runtime.http.call import STATE, ServerState
from runtime.http.config import HttpConfig
from runtime.http.metrics import HttpMetrics
from runtime.http.openapi import openapi_document
from runtime.http.protocol import json_protocol, make_runner
from runtime.lanes import use_one_heap
from runtime.logs import log_to_stderr
from runtime.profile_file import cache_folder
from runtime.wait_policy import suit_machine
from vbert.errors import ConfigError, VbertError

__all__ = ["HttpConfig", "accepting", "bind", "configs", "create_app", "main", "make_key", "run", "serve"]

_BACKLOG = 1024  # connections that wait to be accepted
_log = logging.getLogger("vbert.http")


def create_app(engine: Engine, config: HttpConfig) -> web.Application:
    """The whole HTTP interface of a started engine. Raises ConfigError (the keys file)."""
    keys = KeyRing.load(config.keys)
    app = web.Application(middlewares=[answer_errors])
    app[STATE] = ServerState(
        engine=engine,
        config=config,
        keys=keys,
        metrics=HttpMetrics(engine.snapshot),
        openapi=openapi_document(engine.config, config, keys=not keys.is_open, version=_version()),
        started_s=int(time.time()),
    )
    add_routes(app)
    app.on_response_prepare.append(set_server_header)
    return app


async def serve(
    engine_config: EngineConfig, config: HttpConfig, *, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; then drain and return. `on_ready` gets the URL once requests are accepted.

    A stop: ready says 503 and new requests are refused (the listener stays, so that both can be seen), what was
    admitted is answered, connections close, the engine stops. A second signal ends the process at once.
    Raises ConfigError before the backbone is loaded if keys or address are wrong, else what Engine.start raises.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    engine = Engine(engine_config)
    app = create_app(engine, config)
    with bind(config) as listening:
        async with engine, accepting(app, listening) as url:
            _log.info("%s is served on %s", engine.name, url)
            if on_ready is not None:
                on_ready(url)
            await stop.wait()
            for signum in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(signum)


@asynccontextmanager
async def accepting(app: web.Application, listening: socket.socket) -> AsyncIterator[str]:
    """Accept connections on a bound socket, and yield the URL; at the end drain, then close."""
    state = app[STATE]
    drain_timeout_s = state.engine.config.drain_timeout_s
    runner = make_runner(app, state.config, shutdown_timeout_s=drain_timeout_s)
    await runner.setup()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(partial(json_protocol, runner), sock=listening, backlog=_BACKLOG)
    try:
        yield _url(listening)
        if not await state.drain(drain_timeout_s):
            _log.warning("requests unanswered after %g s of draining are cancelled", drain_timeout_s)
    finally:
        server.close()
        await runner.cleanup()


def run(engine_config: EngineConfig, config: HttpConfig, *, on_ready: Callable[[str], None] | None = None) -> None:
    """`serve` in an event loop of its own."""
    use_one_heap()
    uvloop.run(serve(engine_config, config, on_ready=on_ready))


def bind(config: HttpConfig) -> socket.socket:
    """A bound socket that does not listen yet: a taken port shows at once, clients wait for the loaded backbone."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with ExitStack() as undo:
            listening = undo.enter_context(socket.socket(family, kind, protocol))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted sockets inherit it: the kernel drops a client that does not read its answer.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(config.write_timeout_s * 1000))
            listening.bind(address)
            undo.pop_all()
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.host} port {config.port}: {error}; choose another") from error
    return listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _version() -> str:
    try:
        return version("vbert")
    except PackageNotFoundError:
        return "0"  # a bare checkout


def configs(args: argparse.Namespace) -> tuple[EngineConfig, HttpConfig]:
    """From the flags. A server measures its machine once, and keeps the profile in the user's cache folder."""
    profile = {"profile": str(cache_folder(os.environ))}
    return EngineConfig(**profile | given(args, EngineConfig)), HttpConfig(**given(args, HttpConfig))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="serve.py", description="Serve the tenants of a store on one backbone.", epilog=ENVIRONMENT_HELP
    )
    add_flags(parser, EngineConfig)
    add_flags(parser, HttpConfig)
    args = parser.parse_args(argv)
    if argv is None:
        suit_machine(sys.argv[1:])
    log_to_stderr()
    try:
        run(*configs(args))
    except VbertError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
