"""The files of modules: where they are, and what is known of those that were read before.

A file is hashed when it is read first, and again when the file system says that somebody wrote to it since. Its header
is parsed once.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from runtime.clock import wall_time_ns
from vbert.header import TenantHeader

__all__ = ["ModuleFiles"]

_KEPT = 2048  # about 3 KiB each
_SETTLED_NS = 10**9  # a file written this recently may be written again without another time to show for it

_Stamp = tuple[int, int, int, int, int]


@dataclass(slots=True, eq=False)
class ModuleFiles:
    """path: of a digest's native file. now_ns: wall time, as file systems have it. Any thread may call."""

    path: Callable[[str], Path]
    now_ns: Callable[[], int] = wall_time_ns
    _known: OrderedDict[str, tuple[TenantHeader, _Stamp | None]] = field(default_factory=OrderedDict)
    _adding: threading.Lock = field(default_factory=threading.Lock)

    def header(self, digest: str) -> TenantHeader | None:
        """Of a file that was read lately: its bytes had this digest."""
        known = self._known.get(digest)
        return None if known is None else known[0]

    def unchanged(self, digest: str, found: os.stat_result) -> bool:
        known = self._known.get(digest)
        return known is not None and known[1] is not None and known[1] == _stamp(found)

    def verified(self, digest: str, header: TenantHeader, found: os.stat_result) -> None:
        """The file had these bytes when the file system described it so."""
        settled = self.now_ns() - found.st_ctime_ns >= _SETTLED_NS
        with self._adding:
            if settled or not self.unchanged(digest, found):
                self._known[digest] = header, _stamp(found) if settled else None
            self._known.move_to_end(digest)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)


def _stamp(found: os.stat_result) -> _Stamp:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
