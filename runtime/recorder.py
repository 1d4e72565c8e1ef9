"""Writes the log of requests while serving (`--record`). What goes wrong with its file ends it, never a request."""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

from runtime.clock import Clock
from runtime.request_log import Computed, Offered, batch_line, head, other_line, to_line
from vbert.errors import ConfigError

__all__ = ["Recorder"]

_log = logging.getLogger(__name__)
_LINES = 256  # written at once, by another thread


class Recorder:
    """Touched by the event loop; the file by a thread of its own."""

    def __init__(self, path: str, about: dict[str, Any], clock: Clock) -> None:
        """A file that is there already is kept under another name. Raises ConfigError when it cannot be written."""
        self._begin_s, self._closed = clock.now_s(), False
        self._lines: list[str] = []
        try:
            _move_aside(Path(path))
            self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
            self._file.write(head(about))
        except OSError as error:
            raise ConfigError(f"the request log {path} cannot be written ({error.strerror}); choose another") from error
        self._lane = ThreadPoolExecutor(1, "vbert-record")

    def add(self, request: Offered, outcome: str, total_s: float | None) -> None:
        """request: at_s by the clock; outcome: `ok` or the code of an error."""
        self._append(to_line(request._replace(at_s=request.at_s - self._begin_s), outcome, total_s))

    def add_batch(self, batch: Computed) -> None:
        """Its times by the clock."""
        begin_s = self._begin_s
        since = batch._replace(launched_s=batch.launched_s - begin_s, ended_s=batch.ended_s - begin_s)
        self._append(batch_line(since))

    def add_other(self, ended_s: float) -> None:
        """A batch that tells nothing of how long batches take; when it ended by the clock."""
        self._append(other_line(ended_s - self._begin_s))

    def flush(self) -> None:
        """What was added goes to the file, soon."""
        lines, self._lines = self._lines, []
        if not self._closed:
            self._lane.submit(self._write, lines)

    def close(self) -> None:
        """Blocking. The file has everything that was added."""
        self.flush()
        self._closed = True
        self._lane.shutdown(wait=True)
        self._file.close()

    def _append(self, line: str) -> None:
        self._lines.append(line)
        if len(self._lines) >= _LINES:
            self.flush()

    def _write(self, lines: list[str]) -> None:
        if self._file.closed:
            return
        try:
            self._file.writelines(lines)
            self._file.flush()
        except OSError as error:
            _log.warning("the request log %s ends here: %s", self._file.name, error.strerror)
            with contextlib.suppress(OSError):  # what is still in its buffer
                self._file.close()


def _move_aside(path: Path) -> None:
    """A restart must not wipe what was recorded: FILE becomes FILE.1, or the first number that is free."""
    if path.is_file() and path.stat().st_size:
        number = next(n for n in count(1) if not path.with_name(f"{path.name}.{n}").exists())
        path.rename(path.with_name(f"{path.name}.{number}"))
