"""`RemoteStore`: the tenants of a running server, with the methods of `TenantStore`, over its HTTP API.

For the command line and for scripts: blocking, standard library only. Redirects are refused, since they would carry the
key to another place.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from runtime.versions import ModuleFacts, TenantVersion, Upload
from vbert.errors import ConfigError, VbertError

__all__ = ["RemoteStore"]

_TIMEOUT_S = 300.0  # of one silence on the connection: a server may take long to check and store a large file
_MAX_ANSWER_BYTES = 256 * 2**20


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class RemoteStore:
    """Args: url: http(s)://host[:port]. key: sent as bearer token; "" sends none.

    Every method raises VbertError with the server's own message and `code`, or ConfigError if there is no answer.
    """

    def __init__(self, url: str, key: str = "") -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ConfigError(f"server {url!r} is no address; give one such as http://127.0.0.1:8080")
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("the key has characters that no header can carry; copy it again")
        self.url = url.rstrip("/")
        self._key = key
        self._opener = build_opener(_NoRedirect)

    def put(
        self, tenant: str, data: bytes, facts: ModuleFacts, *, activate: bool = True, if_match: int | None = None
    ) -> tuple[TenantVersion, bool]:
        """`facts` are not sent: the server reads them from the file."""
        if not activate:
            raise ConfigError("a server activates what is uploaded; use --store to add a version that is not served")
        status, answer = self._call("PUT", _path(tenant), data=data, headers=_condition(if_match))
        return _version(answer), status == 201

    def put_many(self, uploads: Sequence[Upload]) -> list[tuple[TenantVersion, bool]]:
        return [self.put(u.tenant, u.data, u.facts, activate=u.activate, if_match=u.if_match) for u in uploads]

    def activate(self, tenant: str, version: int, *, if_match: int | None = None) -> TenantVersion:
        body = json.dumps({"version": version}).encode()
        headers = {"Content-Type": "application/json"} | _condition(if_match)
        return _version(self._call("POST", _path(tenant, "/activate"), data=body, headers=headers)[1])

    def rollback(self, tenant: str, *, if_match: int | None = None) -> TenantVersion:
        return _version(self._call("POST", _path(tenant, "/rollback"), headers=_condition(if_match))[1])

    def remove(self, tenant: str, *, if_match: int | None = None) -> None:
        self._call("DELETE", _path(tenant), headers=_condition(if_match))

    def get(self, tenant: str) -> TenantVersion:
        return _version(self._call("GET", _path(tenant))[1])

    def versions(self, tenant: str) -> list[TenantVersion]:
        return [_version(item) for item in self._call("GET", _path(tenant, "/versions"))[1]["data"]]

    def list(self, after: str = "", limit: int = 1000) -> list[TenantVersion]:
        query = urlencode({"after": after, "limit": limit} if after else {"limit": limit})
        return [_version(item) for item in self._call("GET", f"/v1/tenants?{query}")[1]["data"]]

    def close(self) -> None:
        """Nothing is kept open between two calls."""

    def _call(
        self, method: str, path: str, *, data: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of one call."""
        request = Request(self.url + path, data=data, method=method, headers={"Accept": "application/json"})
        if data is not None:
            request.add_header("Content-Type", "application/octet-stream")
        if self._key:
            request.add_header("Authorization", f"Bearer {self._key}")
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
                return answer.status, json.loads(answer.read(_MAX_ANSWER_BYTES))
        except HTTPError as error:
            raise self._refusal(error) from error
        except (URLError, OSError) as error:
            raise ConfigError(
                f"no answer from {self.url}: {getattr(error, 'reason', error)}; is it running?"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{self.url} does not answer in JSON; is it a vbert server?") from error

    def _refusal(self, error: HTTPError) -> VbertError:
        """The error of a server, as it says it; its code is kept for scripts."""
        try:
            told = json.loads(error.read(2**20))["error"]
            refusal = VbertError(f"{told['message']} ({self.url} answered {error.code} {told['code']})")
            refusal.code = str(told["code"])
        except (ValueError, KeyError, TypeError):
            refusal = VbertError(f"{self.url} answered {error.code} {error.reason}; is it a vbert server?")
        return refusal


def _path(tenant: str, rest: str = "") -> str:
    return f"/v1/tenants/{quote(tenant, safe='')}{rest}"


def _condition(if_match: int | None) -> dict[str, str]:
    if if_match is None:
        return {}
    return {"If-Match": f'"{if_match}"'} if if_match else {"If-None-Match": "*"}


def _version(answer: dict[str, Any]) -> TenantVersion:
    return TenantVersion(
        tenant=answer["id"],
        version=answer["version"],
        digest=answer["digest"],
        num_bytes=answer["num_bytes"],
        created_s=answer["created"],
        active=answer["active"],
        fingerprint=answer["fingerprint"],
        task=answer["task"],
        problem=answer["problem"],
        labels=tuple(answer["labels"]),
        max_length=answer["max_length"],
        kinds=tuple(answer["kinds"]),
        paths=tuple(answer["paths"]),
        skip_fingerprint=answer["skip_fingerprint"],
        exits=tuple(answer["exits"]),
        exit_threshold=answer["exit_threshold"],
        source=answer["source"],
    )
