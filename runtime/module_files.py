"""The files of modules: where they are, and what is known of those that were read before.

A file is hashed when it is read first, and again when the file system says that somebody wrote to it since. Its header
is parsed once.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from runtime.clock import wall_time_ns
from vbert.header import TenantHeader

__all__ = ["ModuleFiles"]

K = TypeVar("K")
V = TypeVar("V")

_HEADERS_KEPT = 2048  # about 3 KiB each
_STAMPS_KEPT = 65_536  # about 300 bytes each
_SETTLED_NS = 10**9  # a file written this recently may be written again without another time to show for it

_STAMP = struct.Struct("<2Q3q")  # of what a file system changes when somebody writes to a file


@dataclass(slots=True, eq=False)
class ModuleFiles:
    """path: of a digest's native file. now_ns: wall time, as file systems have it. Any thread may call."""

    path: Callable[[str], Path]
    now_ns: Callable[[], int] = wall_time_ns
    _headers: OrderedDict[str, TenantHeader] = field(default_factory=OrderedDict)
    _stamps: OrderedDict[bytes, bytes] = field(default_factory=OrderedDict)
    _adding: threading.Lock = field(default_factory=threading.Lock)

    def header(self, digest: str) -> TenantHeader | None:
        """Of a file that was read lately: its bytes had this digest."""
        return self._headers.get(digest)

    def unchanged(self, digest: str, found: os.stat_result) -> bool:
        return self._stamps.get(bytes.fromhex(digest)) == _stamp(found)

    def verified(self, digest: str, header: TenantHeader, found: os.stat_result) -> None:
        """The file had these bytes when the file system described it so, checked now or before."""
        with self._adding:
            _put(self._headers, digest, header, _HEADERS_KEPT)
            if self.now_ns() - found.st_ctime_ns >= _SETTLED_NS:
                _put(self._stamps, bytes.fromhex(digest), _stamp(found), _STAMPS_KEPT)


def _put(kept: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > most:
        kept.popitem(last=False)


def _stamp(found: os.stat_result) -> bytes:
    return _STAMP.pack(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
