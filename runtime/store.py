"""The tenant store: a SQLite catalogue (WAL) beside content-addressed blobs. Knows versions and bytes, no tensors.

    FOLDER/catalogue.sqlite     which version of which tenant is which blob, and which one is active
    FOLDER/blobs/ab/<sha256>.safetensors
    FOLDER/incoming/            writes that are under way
    FOLDER/in_use.lock          held shared by every process that has the store open

Invariants, each of which holds after kill -9 or a power cut at any point:
- A version that was returned is on disk: blob fsynced, renamed, directory fsynced, row committed, in this order.
- A row never names a missing blob. All writes, and the deletion of blobs, happen under the catalogue's write lock.
- What a kill leaves behind, an unfinished or unnamed file, is deleted by the next process that has the store to itself.
- Version numbers of a tenant only grow, also when it is removed and added again.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from runtime.blobs import BlobFolder, digest_of, make_private_folder
from runtime.catalogue import Catalogue
from runtime.errors import InvalidTenantId, StoreFull, VersionConflict
from runtime.in_use import InUse
from runtime.versions import ModuleFacts, TenantVersion, Upload
from vbert.errors import BadRequest, ConfigError, CorruptFile, UnknownTenant

__all__ = ["TenantStore", "check_tenant_id"]

_TENANT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_HISTORY = 100
_UNNAMED = "digest NOT IN (SELECT digest FROM versions)"
_SELECT = """
SELECT tenant, version, digest, num_bytes, created_s, active IS version, facts
FROM tenants JOIN versions USING (tenant) JOIN blobs USING (digest)
"""


def check_tenant_id(tenant: str) -> str:
    """Returns `tenant`. Raises InvalidTenantId."""
    if not _TENANT_ID.fullmatch(tenant):
        raise InvalidTenantId(
            f"tenant id {tenant[:160]!r} is not [A-Za-z0-9][A-Za-z0-9._-]{{0,127}}; choose another name", param="tenant"
        )
    return tenant


class TenantStore:
    """One process's handle. Thread-safe.

    Args:
        folder: made if absent (mode 0700), unless `create` is false, which raises ConfigError instead.
        max_bytes: of all blobs together, those of removed tenants included until `collect_garbage` deletes them.
    Raises: ConfigError (no store there, one of another schema version, or not writable), CorruptFile.
    """

    def __init__(self, folder: str | os.PathLike[str], *, max_bytes: int | None = None, create: bool = True) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        if not create and not (self.folder / "catalogue.sqlite").is_file():
            raise ConfigError(f"there is no tenant store in {self.folder}; give the folder that `vbert serve` uses")
        make_private_folder(self.folder)
        self._blobs = BlobFolder(self.folder)
        self._in_use = InUse(self.folder / "in_use.lock")
        try:
            self._catalogue = self._open()
        except BaseException:
            self._in_use.close()
            raise
        try:
            self._clean_up()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every connection; no other method may be called afterwards."""
        self._catalogue.close()
        self._in_use.close()

    def __enter__(self) -> TenantStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- writing ---------------------------------------------------------------------------------------------------

    def put(
        self, tenant: str, data: bytes, facts: ModuleFacts, *, activate: bool = True, if_match: int | None = None
    ) -> tuple[TenantVersion, bool]:
        """Store one native file as a version of `tenant`; returns it and whether it is new.

        Bytes that equal those of any version the tenant has make no new one: that version is activated and returned.
        Raises: InvalidTenantId, VersionConflict, StoreFull.
        """
        return self.put_many([Upload(tenant=tenant, data=data, facts=facts, activate=activate, if_match=if_match)])[0]

    def put_many(self, uploads: Sequence[Upload]) -> list[tuple[TenantVersion, bool]]:
        """`put` for each upload, in one commit: all or none. Saves most of the fsyncs of a bulk import."""
        for upload in uploads:
            check_tenant_id(upload.tenant)
        digests = [upload.digest or digest_of(upload.data) for upload in uploads]
        try:
            with self._catalogue.write() as db:
                results = [self._add(db, upload, digest) for upload, digest in zip(uploads, digests, strict=True)]
                if any(created for _, created in results):
                    self._check_room(db)
                # Before the commit: no row is ever visible whose blob is not durable.
                self._blobs.write({digest: upload.data for upload, digest in zip(uploads, digests, strict=True)})
        except StoreFull:  # where it was the commit that found no room, the files are there
            self._delete_unnamed_files(digests)
            raise
        return results

    def activate(self, tenant: str, version: int, *, if_match: int | None = None) -> TenantVersion:
        """Make `version` the one that is served. Raises UnknownTenant, VersionConflict."""
        with self._catalogue.write() as db:
            _match(tenant, _active(db, tenant), if_match)
            return _activate(db, tenant, version)

    def rollback(self, tenant: str, *, if_match: int | None = None) -> TenantVersion:
        """Go back to the version that was active before the present one; can be repeated.

        Raises: UnknownTenant, VersionConflict, BadRequest (nothing was active before).
        """
        with self._catalogue.write() as db:
            _match(tenant, active := _active(db, tenant), if_match)
            row = db.execute("SELECT history FROM tenants WHERE tenant = ?", (tenant,)).fetchone()
            if not active or row is None:
                raise _unknown(tenant)
            *history, previous = json.loads(row[0]) or [None]
            if previous is None:
                raise BadRequest(
                    f"tenant {tenant!r} has no version before {active}; add or activate one", param="tenant"
                )
            _set_active(db, tenant, previous, history)
            return _one(db, tenant, previous)

    def remove(self, tenant: str, *, if_match: int | None = None) -> None:
        """Forget all versions; the blobs stay until `collect_garbage`. Raises UnknownTenant, VersionConflict."""
        with self._catalogue.write() as db:
            _match(tenant, _active(db, tenant), if_match)
            if not db.execute("DELETE FROM versions WHERE tenant = ?", (tenant,)).rowcount:
                raise _unknown(tenant)
            _set_active(db, tenant, None, [])

    def set_self_tests(self, digest: str, data: bytes) -> None:
        """Keep self-tests made after registration beside their blob; nothing happens if the blob is gone meanwhile."""
        with self._catalogue.write() as db:
            db.execute("INSERT OR REPLACE INTO self_tests SELECT digest, ? FROM blobs WHERE digest = ?", (data, digest))

    def collect_garbage(self, digests: Set[str]) -> tuple[str, ...]:
        """Delete those of `digests` that no version names (see `garbage`) and return them. None goes while another
        process has the store open, which may be about to read any."""
        with self._catalogue.write() as db, self._in_use.alone() as alone:
            delete = f"DELETE FROM blobs WHERE digest = ? AND {_UNNAMED}"
            gone = tuple(digest for digest in digests if alone and db.execute(delete, (digest,)).rowcount)
            for digest in gone:
                self._blobs.delete(digest)
        return gone

    # ---- reading ---------------------------------------------------------------------------------------------------

    def resolve(self, tenant: str) -> TenantVersion:
        """The active version, as of the last commit of any process; about 10 us. Raises UnknownTenant."""
        if not _TENANT_ID.fullmatch(tenant):  # such a name was never stored, and a lone surrogate cannot be bound
            raise _unknown(tenant)
        rows = self._catalogue.read(_SELECT + "WHERE tenant = ? AND version = active", (tenant,))
        if not rows:
            raise _unknown(tenant)
        return _version(rows[0])

    get = resolve

    def versions(self, tenant: str) -> list[TenantVersion]:
        """Every version, oldest first. Raises UnknownTenant."""
        known = _TENANT_ID.fullmatch(tenant)
        rows = self._catalogue.read(_SELECT + "WHERE tenant = ? ORDER BY version", (tenant,)) if known else []
        if not rows:
            raise _unknown(tenant)
        return [_version(row) for row in rows]

    def list(self, after: str = "", limit: int = 1000) -> list[TenantVersion]:
        """The active versions, by tenant id, of at most `limit` tenants whose id sorts after `after`."""
        where = "WHERE tenant > ? AND version = active ORDER BY tenant LIMIT ?"
        return [_version(row) for row in self._catalogue.read(_SELECT + where, (after, limit))]

    def garbage(self) -> set[str]:
        """Digests that no version names any more, whichever process removed them; about 3 ms with 10,000 blobs."""
        return {digest for (digest,) in self._catalogue.read(f"SELECT digest FROM blobs WHERE {_UNNAMED}")}

    def blob_path(self, digest: str) -> Path:
        return self._blobs.path(digest)

    def self_tests(self, digest: str) -> bytes | None:
        rows = self._catalogue.read("SELECT data FROM self_tests WHERE digest = ?", (digest,))
        return rows[0][0] if rows else None

    def num_bytes(self) -> int:
        """Bytes of all blobs, those not yet collected included."""
        return int(self._catalogue.read("SELECT total(num_bytes) FROM blobs")[0][0])

    def check(self, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Read everything; returns the number of blobs. `progress(done, total)` is called after each.

        Raises: CorruptFile, naming every tenant and file that is damaged.
        """
        problems = [row[0] for row in self._catalogue.read("PRAGMA integrity_check") if row[0] != "ok"]
        if problems:
            raise CorruptFile(f"{self._catalogue.path} is damaged: {'; '.join(problems)[:500]}; restore it from a copy")
        rows = self._catalogue.read("SELECT digest, group_concat(DISTINCT tenant) FROM versions GROUP BY digest")
        for done, (digest, tenants) in enumerate(rows, 1):
            try:
                self._blobs.verify(digest)
            except CorruptFile as error:
                problems.append(f"tenants {tenants}: {error.message}")
            progress(done, len(rows))
        if problems:
            raise CorruptFile(f"{len(problems)} of {len(rows)} blobs are damaged: {'; '.join(problems)}")
        return len(rows)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _open(self) -> Catalogue:
        """Atomic: whoever comes second waits for the lock and finds the catalogue."""
        path = self.folder / "catalogue.sqlite"
        if not path.exists():
            self._in_use.exclude()
            if not path.exists():
                if not self._blobs.is_empty():  # never mistake the blobs of a lost catalogue for garbage
                    raise CorruptFile(f"{path} is missing but there are blobs; restore it or move {self.folder} away")
                Catalogue.create(path, self.folder / "incoming" / "catalogue.sqlite")
        self._in_use.share()
        return Catalogue(path)

    def _clean_up(self) -> None:
        """Delete every file that no version names: garbage, and what a kill left behind."""
        with self._catalogue.write() as db, self._in_use.alone() as alone:
            if alone:
                db.execute(f"DELETE FROM blobs WHERE {_UNNAMED}")
                self._blobs.sweep({digest for (digest,) in db.execute("SELECT digest FROM blobs")})

    def _delete_unnamed_files(self, digests: Sequence[str]) -> None:
        with self._catalogue.write() as db:
            for digest in digests:
                if not db.execute("SELECT 1 FROM blobs WHERE digest = ?", (digest,)).fetchone():
                    self._blobs.delete(digest)

    def _add(self, db: sqlite3.Connection, upload: Upload, digest: str) -> tuple[TenantVersion, bool]:
        tenant = upload.tenant
        _match(tenant, _active(db, tenant), upload.if_match)
        same = db.execute("SELECT version FROM versions WHERE tenant = ? AND digest = ?", (tenant, digest)).fetchone()
        version = same[0] if same else _insert(db, upload, digest)
        result = _activate(db, tenant, version) if upload.activate else _one(db, tenant, version)
        return result, same is None

    def _check_room(self, db: sqlite3.Connection) -> None:
        if self.max_bytes is None:
            return
        needed = int(db.execute("SELECT total(num_bytes) FROM blobs").fetchone()[0])
        if needed > self.max_bytes:
            raise StoreFull(
                f"store {self.folder} would hold {needed} bytes, its limit is {self.max_bytes}; remove tenants first"
            )


def _unknown(tenant: str) -> UnknownTenant:
    return UnknownTenant(
        f"there is no active tenant {tenant[:160]!r}; add it or see the list of tenants", param="model"
    )


def _match(tenant: str, active: int, if_match: int | None) -> None:
    if if_match is not None and if_match != active:
        has = f"version {active}" if active else "no active version"
        raise VersionConflict(f"tenant {tenant!r} has {has}, not version {if_match}; read it again and retry")


def _active(db: sqlite3.Connection, tenant: str) -> int:
    row = db.execute("SELECT active FROM tenants WHERE tenant = ?", (tenant,)).fetchone()
    return (row and row[0]) or 0


def _insert(db: sqlite3.Connection, upload: Upload, digest: str) -> int:
    db.execute(
        "INSERT INTO blobs VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET facts = excluded.facts",
        (digest, len(upload.data), json.dumps(asdict(upload.facts))),
    )
    db.execute(
        "INSERT INTO tenants (tenant, last_version) VALUES (?, 1)"
        " ON CONFLICT DO UPDATE SET last_version = last_version + 1",
        (upload.tenant,),
    )
    db.execute(
        "INSERT INTO versions (tenant, version, digest) SELECT tenant, last_version, ? FROM tenants WHERE tenant = ?",
        (digest, upload.tenant),
    )
    row = db.execute("SELECT last_version FROM tenants WHERE tenant = ?", (upload.tenant,)).fetchone()
    return int(row[0])


def _activate(db: sqlite3.Connection, tenant: str, version: int) -> TenantVersion:
    found = _one(db, tenant, version)
    if found.active:
        return found
    row = db.execute("SELECT history, active FROM tenants WHERE tenant = ?", (tenant,)).fetchone()
    history = json.loads(row[0]) + ([row[1]] if row[1] else [])
    _set_active(db, tenant, version, history[-_MAX_HISTORY:])
    return _one(db, tenant, version)


def _set_active(db: sqlite3.Connection, tenant: str, version: int | None, history: Sequence[int]) -> None:
    """`history`: the versions that were active before, the latest last; what `rollback` goes back through."""
    db.execute("UPDATE tenants SET active = ?, history = ? WHERE tenant = ?", (version, json.dumps(history), tenant))


def _one(db: sqlite3.Connection, tenant: str, version: int) -> TenantVersion:
    row = db.execute(_SELECT + "WHERE tenant = ? AND version = ?", (tenant, version)).fetchone()
    if row is None:
        raise UnknownTenant(
            f"tenant {tenant[:160]!r} has no version {version}; see its list of versions", param="version"
        )
    return _version(row)


@lru_cache(maxsize=4096)
def _version(row: tuple[Any, ...]) -> TenantVersion:
    """Cached, since `resolve` runs for every request and a tenant may have hundreds of labels."""
    tenant, version, digest, num_bytes, created_s, active, facts = row
    values: dict[str, Any] = json.loads(facts)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return TenantVersion(
        tenant=tenant,
        version=version,
        digest=digest,
        num_bytes=num_bytes,
        created_s=created_s,
        active=bool(active),
        **values,
    )
