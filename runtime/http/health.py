"""Is it alive, is it ready, and what does it count. None of these routes computes anything or waits in a queue."""

from __future__ import annotations

from aiohttp import web

from runtime.http.call import Call, json_response
from runtime.http.errors import ERROR_TYPES

__all__ = ["live", "metrics", "openapi", "ready"]


async def live(call: Call) -> web.Response:
    return json_response({"status": "live"})


async def ready(call: Call) -> web.Response:
    """503 while draining, or when the engine's own canary or watchdog says that it does not work. Overload is not."""
    readiness = call.engine.ready()
    reasons = (["draining"] if call.state.draining else []) + list(readiness.reasons)
    content = {
        "status": "not_ready" if reasons else "ready",
        "reasons": reasons,
        "canary": readiness.canary,
        "watchdog": readiness.watchdog,
    }
    if reasons:
        message = f"the server is not ready: {'; '.join(reasons)}; ask another one"
        content["error"] = {"message": message, "type": ERROR_TYPES[503], "param": None, "code": "not_ready"}
    return json_response(content, status=503 if reasons else 200)


async def metrics(call: Call) -> web.Response:
    body, content_type = call.state.metrics.render()
    return web.Response(body=body, headers={"Content-Type": content_type})


async def openapi(call: Call) -> web.Response:
    return web.Response(body=call.state.openapi, content_type="application/json")
