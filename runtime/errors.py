"""Errors of serving: who must wait, and for how long. The root and the split are in vbert/errors.py.

Overloaded
|-- QueueFull           the caller's own share of the queue is full (HTTP 429)
|-- ServerFull          the whole queue is full (HTTP 503)
|-- DeadlineUnreachable too much waits for the answer to be in time; nothing was begun (HTTP 503)
|-- Draining            the engine is stopping and takes nothing new (HTTP 503)
`-- DeadlineExceeded    the answer would come too late; the request was not computed, or not to the end (HTTP 504)
BadRequest
|-- RequestTooLarge     more inputs, tokens or bytes in one request than the limit (HTTP 413)
`-- InvalidTenantId     not [A-Za-z0-9][A-Za-z0-9._-]{0,127}, or the backbone's own name
VersionConflict         If-Match names another version than the active one (HTTP 409)
ModuleTooLarge          a tenant's module is larger than the whole module budget (HTTP 507)
StoreFull               the disk or the store's byte limit is full (HTTP 507)
ComputeFailed           the forward pass of a batch failed; nothing else is known to be wrong (HTTP 500)
"""

from __future__ import annotations

from vbert.errors import BadRequest, Overloaded, VbertError

__all__ = [
    "ComputeFailed",
    "DeadlineExceeded",
    "DeadlineUnreachable",
    "Draining",
    "InvalidTenantId",
    "ModuleTooLarge",
    "QueueFull",
    "RequestTooLarge",
    "ServerFull",
    "StoreFull",
    "VersionConflict",
]


class _RetryLater(Overloaded):
    """`retry_after_s`: when asking again may help; HTTP rounds it up to whole seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class QueueFull(_RetryLater):
    code = "queue_full"


class ServerFull(_RetryLater):
    code = "server_full"


class DeadlineUnreachable(_RetryLater):
    code = "deadline_unreachable"


class Draining(_RetryLater):
    code = "draining"


class DeadlineExceeded(Overloaded):
    code = "deadline_exceeded"


class RequestTooLarge(BadRequest):
    code = "request_too_large"


class InvalidTenantId(BadRequest):
    code = "invalid_tenant_id"


class VersionConflict(VbertError):
    code = "version_conflict"


class ModuleTooLarge(VbertError):
    code = "module_too_large"


class StoreFull(VbertError):
    code = "store_full"


class ComputeFailed(VbertError):
    code = "compute_failed"
