"""The SQLite file of a tenant store: schema, connections, transactions, and SQLite's errors in our words.

Knows no versions: what the rows mean is in runtime/store.py. One writing connection under a lock, one reading
connection a thread; WAL, so readers never wait for a writer, of this process or another.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runtime.blobs import fsync_folder
from runtime.errors import StoreFull
from vbert.errors import ConfigError, CorruptFile, Overloaded

__all__ = ["Catalogue"]

_SCHEMA_VERSION = 1
_APPLICATION_ID = 0x76424552  # "vBER": tells our catalogue from any other SQLite file
_BUSY_TIMEOUT_S = 30.0  # a write holds the lock while it fsyncs one blob, or one batch of a bulk import
_SCHEMA = f"""
PRAGMA journal_mode = WAL;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_SCHEMA_VERSION};
CREATE TABLE blobs (digest TEXT PRIMARY KEY, num_bytes INTEGER NOT NULL, facts TEXT NOT NULL);
CREATE TABLE self_tests (digest TEXT PRIMARY KEY REFERENCES blobs ON DELETE CASCADE, data BLOB NOT NULL);
-- A removed tenant keeps its row, with no active version, so that its numbers are not given out again.
CREATE TABLE tenants (
    tenant TEXT PRIMARY KEY, last_version INTEGER NOT NULL, active INTEGER, history TEXT NOT NULL DEFAULT '[]'
) WITHOUT ROWID;
CREATE TABLE versions (
    tenant TEXT REFERENCES tenants, version INTEGER, digest TEXT NOT NULL REFERENCES blobs,
    created_s REAL NOT NULL DEFAULT ((julianday('now') - 2440587.5) * 86400.0), PRIMARY KEY (tenant, version)
) WITHOUT ROWID;
CREATE INDEX versions_by_digest ON versions (digest);
"""


def explained(path: Path, error: Exception) -> Exception:
    """What SQLite or the filesystem said, as one of our errors where the caller can do something about it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreFull(
            f"store {path.parent} cannot grow: {error.strerror}; free disk space or raise the file size limit"
        )
    if not isinstance(error, sqlite3.Error):
        return error
    code = getattr(error, "sqlite_errorcode", 0)
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE):
        return StoreFull(f"{path} cannot grow: {error}; free disk space or raise the file size limit")
    if code & 0xFF == sqlite3.SQLITE_BUSY:
        return Overloaded(f"another process has been writing to {path} for {_BUSY_TIMEOUT_S:.0f} s; try again")
    if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return CorruptFile(f"{path} is damaged: {error}; restore it from a copy")
    if code & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR):
        return ConfigError(
            f"{path} cannot be opened and written: {error}; check the permissions of its folder, its disk"
        )
    return error


class Catalogue:
    """Opens the catalogue at `path`. Raises ConfigError (another schema version), CorruptFile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._readers = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._writer = self._connect()
        try:
            self._check_schema()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def create(path: Path, aside: Path) -> None:
        """Make an empty catalogue, atomically: made as `aside`, on the same filesystem, and renamed."""
        aside.unlink(missing_ok=True)
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL, 0o600))  # SQLite gives its -wal and -shm files the same mode
        connection = sqlite3.connect(aside)
        connection.executescript(_SCHEMA)
        connection.close()
        os.rename(aside, path)
        fsync_folder(path.parent)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def read(self, sql: str, arguments: Sequence[Any] = ()) -> list[Any]:
        """Rows as of the last commit of any process."""
        connection = getattr(self._readers, "connection", None)
        if connection is None:
            connection = self._readers.connection = self._connect()
        try:
            rows: list[Any] = connection.execute(sql, arguments).fetchall()
        except sqlite3.Error as error:
            raise explained(self.path, error) from error
        return rows

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the write lock of all processes from its first statement on."""
        with self._lock:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException as error:
                with suppress(sqlite3.Error):  # SQLite rolled back by itself; the first error is the one to tell
                    self._writer.execute("ROLLBACK")
                if isinstance(error, (sqlite3.Error, OSError)):
                    raise explained(self.path, error) from error
                raise

    def _connect(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(
                self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._connections.append(connection)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
        except sqlite3.Error as error:
            raise explained(self.path, error) from error
        return connection

    def _check_schema(self) -> None:
        ((application,),), ((version,),) = self.read("PRAGMA application_id"), self.read("PRAGMA user_version")
        if application != _APPLICATION_ID:
            raise CorruptFile(f"{self.path} is not a vbert catalogue; give another store")
        if version != _SCHEMA_VERSION:
            raise ConfigError(
                f"{self.path} has schema version {version}, this vbert reads {_SCHEMA_VERSION}; "
                "use the vbert that wrote it, or another store"
            )
