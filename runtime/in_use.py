"""`in_use.lock` of a store, held shared by every process that has it open, so that one can tell if it is alone."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["InUse"]


class InUse:
    """One process's handle; the lock is free until `share` or `exclude`, and a process that dies gives it back."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def share(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def exclude(self) -> None:
        """Waits until nobody else has the store open."""
        fcntl.flock(self._file, fcntl.LOCK_EX)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether nobody else has the store open, and then nobody can open it until the block ends.

        Converting a flock gives the old one up first: the caller holds a lock that keeps two processes from converting
        at once.
        """
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        try:
            yield alone
        finally:
            self.share()
