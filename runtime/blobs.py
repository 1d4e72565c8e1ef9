"""Content-addressed files of one store: `blobs/ab/<sha256>.safetensors`. Knows bytes and digests, no tenants.

A blob is complete or absent: bytes go to a private file in `incoming/` of the same filesystem, are fsynced, renamed to
their digest, and the directory is fsynced. A kill at any point leaves at most an unnamed file, which `sweep` deletes.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from vbert.errors import CorruptFile

__all__ = ["BlobFolder", "digest_of", "fsync_folder", "make_private_folder"]

_FLUSHED_AT_ONCE = 4
_BLOB_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")


def digest_of(data: bytes) -> str:
    """SHA-256 of a native file, in hex: its identity everywhere in the runtime."""
    return hashlib.sha256(data).hexdigest()


def make_private_folder(folder: Path) -> None:
    """Create `folder` (mode 0700) so that it survives a power cut. One that exists is left as it is."""
    if not folder.is_dir():
        folder.mkdir(mode=0o700, exist_ok=True)
        fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; fsync of a file does not do that for its directory entry."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BlobFolder:
    """The caller serialises writers against `sweep` (the store holds the catalogue's write lock for both)."""

    def __init__(self, folder: Path) -> None:
        self._blobs = folder / "blobs"
        self._incoming = folder / "incoming"
        make_private_folder(self._blobs)
        make_private_folder(self._incoming)

    def path(self, digest: str) -> Path:
        return self._blobs / digest[:2] / f"{digest}.safetensors"

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Make blobs durable under their digests; on return they survive a power cut.

        An intact blob is kept, a damaged one replaced, so sending a tenant again repairs it. Raises OSError (no
        space, file size limit) with no partial blob left.
        """
        paths = {digest: self.path(digest) for digest in contents}
        folders = {path.parent for path in paths.values()}
        for folder in folders:
            make_private_folder(folder)
        with ExitStack() as unfinished:
            missing = [digest for digest in contents if not self._is_intact(digest)]
            names = [self._new_file(unfinished) for _ in missing]
            with ThreadPoolExecutor(_FLUSHED_AT_ONCE) as pool:  # a disk flushes several files in the time of two
                list(pool.map(_write_through, names, (contents[digest] for digest in missing)))
            for digest, name in zip(missing, names, strict=True):
                os.rename(name, paths[digest])
        for folder in folders:  # also of files that were kept: who wrote them may have been killed before this
            fsync_folder(folder)

    def verify(self, digest: str) -> None:
        """Raises CorruptFile if the blob is missing or its bytes do not give its digest."""
        path = self.path(digest)
        if not path.is_file():
            raise CorruptFile(f"blob {path} is missing; add the tenants that use it again")
        if not self._is_intact(digest):
            raise CorruptFile(f"blob {path} does not match its SHA-256; add the tenants that use it again")

    def is_empty(self) -> bool:
        return next(self._files(), None) is None

    def delete(self, digest: str) -> None:
        """Nothing happens if there is no such blob."""
        self.path(digest).unlink(missing_ok=True)

    def sweep(self, keep: Set[str]) -> None:
        """Delete unfinished writes and every blob whose digest is not in `keep`. Reads all names."""
        for path in self._incoming.glob("*.part"):
            path.unlink()
        for digest, path in self._files():
            if digest not in keep:
                path.unlink()

    def _files(self) -> Iterator[tuple[str, Path]]:
        for path in self._blobs.glob("??/*"):
            if match := _BLOB_NAME.fullmatch(path.name):
                yield match[1], path

    def _is_intact(self, digest: str) -> bool:
        try:
            with self.path(digest).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == digest
        except FileNotFoundError:
            return False

    def _new_file(self, unfinished: ExitStack) -> str:
        """Name of an empty file; `unfinished` deletes it where it was not renamed."""
        descriptor, name = tempfile.mkstemp(suffix=".part", dir=self._incoming)  # mkstemp makes it 0600
        os.close(descriptor)
        unfinished.callback(Path(name).unlink, missing_ok=True)
        return name


def _write_through(name: str, data: bytes) -> None:
    with open(name, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
