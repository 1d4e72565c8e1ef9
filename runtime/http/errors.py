"""Every error as HTTP: one table class -> status, one JSON shape {"error": {message, type, param, code}}.

HttpError             what only HTTP can get wrong
|-- MalformedBody         not JSON, not UTF-8, or broken framing (400)
|-- Unauthorized          no key, or one that is not known (401)
|-- Forbidden             the key lacks the scope, or is bound to other tenants (403)
|-- UnknownRoute          no such path (404)
|-- MethodNotAllowed      the path exists, with other methods (405)
|-- BodyTimeout           the body did not arrive in time (408)
|-- UnsupportedMedia      another content type or encoding than the route takes (415)
`-- InvalidValue          valid JSON, or a header or query, with a value that is not allowed (422)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from pydantic_core import to_json

from runtime import errors as serving
from vbert import errors as computing
from vbert.errors import VbertError

__all__ = [
    "ERROR_TYPES",
    "STATUS",
    "BodyTimeout",
    "Forbidden",
    "HttpError",
    "InvalidValue",
    "MalformedBody",
    "MethodNotAllowed",
    "Unauthorized",
    "UnknownRoute",
    "UnsupportedMedia",
    "error_response",
    "status_of",
]


class HttpError(VbertError):
    """`headers` go out with the answer."""

    def __init__(self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, param=param)
        self.headers = headers or {}


class MalformedBody(HttpError):
    code = "malformed_body"


class Unauthorized(HttpError):
    code = "invalid_api_key"


class Forbidden(HttpError):
    code = "forbidden"


class UnknownRoute(HttpError):
    code = "unknown_route"


class MethodNotAllowed(HttpError):
    code = "method_not_allowed"


class BodyTimeout(HttpError):
    code = "body_timeout"


class UnsupportedMedia(HttpError):
    code = "unsupported_media_type"


class InvalidValue(HttpError):
    code = "invalid_value"


# tests/http/test_errors.py proves that every class of the three trees stands here. A tenant whose stored file fails
# its load is 422 and not 5xx: the server is well, asking again does not help, another version of the tenant does.
STATUS: dict[type[VbertError], int] = {
    VbertError: 500,
    computing.BadRequest: 422,
    computing.InputTooLong: 422,
    computing.UnknownTenant: 404,
    computing.WrongTask: 422,
    computing.RefusedCheckpoint: 422,
    computing.Overloaded: 503,
    computing.ConfigError: 500,
    computing.CorruptFile: 422,
    computing.WrongBackbone: 422,
    computing.SelfTestFailed: 422,
    computing.ShapeError: 500,
    computing.KernelUnavailable: 500,
    serving.QueueFull: 429,
    serving.ServerFull: 503,
    serving.DeadlineUnreachable: 503,
    serving.Draining: 503,
    serving.DeadlineExceeded: 504,
    serving.RequestTooLarge: 413,
    serving.InvalidTenantId: 422,
    serving.VersionConflict: 409,
    serving.ModuleTooLarge: 507,
    serving.StoreFull: 507,
    serving.ComputeFailed: 500,
    HttpError: 500,
    MalformedBody: 400,
    Unauthorized: 401,
    Forbidden: 403,
    UnknownRoute: 404,
    MethodNotAllowed: 405,
    BodyTimeout: 408,
    UnsupportedMedia: 415,
    InvalidValue: 422,
}

# `type` is a function of the status, with the names the openai client gives to its exceptions where it has one.
ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "DeadlineExceededError",
    507: "InsufficientStorageError",
}


def status_of(error: VbertError) -> int:
    """The status of the nearest class in the table, so that a subclass made elsewhere has its parent's."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def error_response(error: VbertError, request_id: str) -> web.Response:
    """The answer for `error`. What failed inside the server (500) is named by code only; the log has the rest."""
    status = status_of(error)
    message = error.message
    if status == 500:
        message = f"the server failed on this request; its log has the cause under request id {request_id}"
    content: dict[str, Any] = {
        "message": message,
        "type": ERROR_TYPES[status],
        "param": error.param,
        "code": error.code,
    }
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    retry_after_s: float | None = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        content["retry_after_ms"] = math.ceil(retry_after_s * 1000)
        headers["Retry-After"] = str(math.ceil(retry_after_s))
    return web.Response(
        status=status, body=to_json({"error": content}), content_type="application/json", headers=headers
    )
