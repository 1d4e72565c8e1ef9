"""API keys: who is calling, and which scopes and tenants are open to them. Only hashes are kept.

A keys file has one line a key, `name:sha256:scopes:tenants`; empty lines and those with # are skipped:

    search-team:9f86d0...:infer:search.*,demo
    ops:60303a...:infer,admin:*

`tenants` are shell patterns; a key with other patterns than * neither uses nor sees the tenants they do not match.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hmac import compare_digest
from pathlib import Path
from urllib.parse import urlsplit

from runtime.http.config import is_loopback
from runtime.http.errors import Forbidden, Unauthorized
from vbert.errors import ConfigError

__all__ = ["ADMIN", "ANONYMOUS", "INFER", "METRICS", "SCOPES", "Key", "KeyRing", "check_local", "make_key"]

INFER, ADMIN, METRICS = "infer", "admin", "metrics"
SCOPES = (INFER, ADMIN, METRICS)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATTERN = re.compile(r"[A-Za-z0-9._*?\[\]!/-]{1,256}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """`name` is the caller's identity: queue shares are counted by it. `digest`: SHA-256 of the secret, hex."""

    name: str
    digest: str
    scopes: frozenset[str]
    tenants: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"key name {self.name!r} is not [A-Za-z0-9][A-Za-z0-9._-]{{0,63}}; choose another")
        if not _DIGEST.fullmatch(self.digest):
            raise ConfigError(
                f"the hash of key {self.name!r} is not 64 lower-case hexadecimal digits; make the key anew"
            )
        if not self.scopes <= set(SCOPES):
            raise ConfigError(f"key {self.name!r} has scopes {sorted(self.scopes)}; give some of {', '.join(SCOPES)}")
        if not all(_PATTERN.fullmatch(pattern) for pattern in self.tenants):
            raise ConfigError(
                f"key {self.name!r} has tenant patterns {list(self.tenants)}; give patterns such as * or acme.*"
            )

    def sees(self, tenant: str) -> bool:
        return any(fnmatchcase(tenant, pattern) for pattern in self.tenants)

    def check_scope(self, scopes: frozenset[str]) -> None:
        """Raises Forbidden unless the key has one of `scopes`."""
        if not self.scopes & scopes:
            raise Forbidden(
                f"key {self.name!r} has scope {', '.join(sorted(self.scopes))} and this route needs "
                f"{' or '.join(sorted(scopes))}; use another key"
            )

    def check_tenant(self, tenant: str, param: str | None = None) -> None:
        """Raises Forbidden unless the key may use the tenant, whether or not there is one of that name."""
        if not self.sees(tenant):
            raise Forbidden(f"key {self.name!r} is not bound to tenant {tenant[:160]!r}; use another key", param=param)

    def line(self) -> str:
        return f"{self.name}:{self.digest}:{','.join(sorted(self.scopes))}:{','.join(self.tenants)}"


def _hash(secret: str) -> str:
    # A plain hash suffices: the secrets are 256 random bits, not words somebody chose.
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def make_key(name: str, scopes: Sequence[str], tenants: Sequence[str] = ("*",)) -> tuple[str, Key]:
    """A new secret, shown once, and the key whose `line()` goes into the keys file. Raises ConfigError."""
    secret = "vb-" + secrets.token_urlsafe(32)
    return secret, Key(name=name, digest=_hash(secret), scopes=frozenset(scopes), tenants=tuple(tenants))


def _read_key(line: str) -> Key:
    fields = line.split(":")
    if len(fields) != 4:
        raise ConfigError(f"{len(fields)} fields instead of the 4 of name:sha256:scopes:tenants")
    name, digest, scopes, tenants = fields
    return Key(name=name, digest=digest, scopes=frozenset(scopes.split(",")), tenants=tuple(tenants.split(",")))


def check_local(headers: Mapping[str, str]) -> None:
    """A server without keys trusts this machine's programs, not web pages from elsewhere that a browser on it shows.

    Such a page reaches a loopback address under another Host (a name rebound to it) or with its own Origin.
    Raises Forbidden.
    """
    for name in ("Host", "Origin"):
        value = headers.get(name, "localhost")
        if not is_loopback(_hostname(value)):
            raise Forbidden(
                f"{name} is {value[:80]!r} and a server without keys answers this machine only; set keys", param=name
            )


def _hostname(value: str) -> str:
    """Of a Host or an Origin; "" if there is none."""
    try:
        return urlsplit(value if "//" in value else f"//{value}").hostname or ""
    except ValueError:
        return ""


class KeyRing:
    """All keys of one server. Without any, whoever reaches the server is `local` and may do everything."""

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        names = [key.name for key in keys]
        if len(set(names)) != len(names):
            raise ConfigError("two keys have the same name; a name is a caller's identity, give each key its own")
        self._keys = tuple(keys)

    @classmethod
    def load(cls, path: str) -> KeyRing:
        """Reads a keys file; "" is the ring without keys. Raises ConfigError with the line's number."""
        if not path:
            return cls()
        try:
            lines = Path(path).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"keys file {path} cannot be read: {error}") from error
        keys = []
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.lstrip().startswith("#"):
                try:
                    keys.append(_read_key(line.strip()))
                except ConfigError as error:
                    raise ConfigError(f"keys file {path}, line {number}: {error.message}") from error
        if not keys:
            raise ConfigError(
                f"keys file {path} has no keys; add one, or serve without the option on a loopback address"
            )
        return cls(keys)

    @property
    def is_open(self) -> bool:
        return not self._keys

    def authenticate(self, authorization: str | None) -> Key:
        """The key named by an Authorization header. Raises Unauthorized.

        Every key is compared, and hashes are, so neither which key matched nor how much of it shows in the time.
        """
        if self.is_open:
            return _LOCAL
        scheme, _, secret = (authorization or "").partition(" ")
        digest = _hash(secret.strip())
        found = [key for key in self._keys if compare_digest(key.digest, digest)]
        if scheme.lower() != "bearer" or not found:
            raise Unauthorized(
                "no known key in the Authorization header; send 'Authorization: Bearer KEY'",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found[0]


# Callers without a secret: on public routes, and anyone where no keys are set.
ANONYMOUS = Key(name="anonymous", digest="0" * 64, scopes=frozenset(), tenants=())
_LOCAL = Key(name="local", digest="0" * 64, scopes=frozenset(SCOPES))
