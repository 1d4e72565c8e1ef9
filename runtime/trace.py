"""A Chrome trace of the lanes, one row each: open the file in ui.perfetto.dev or chrome://tracing.

Times are the device's own: a span lies between two events of its streams. The file is a complete JSON array after every
write, whatever ends the process, and memory is bounded: spans wait only until their events are reached.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.streams import Device, Event
from vbert.errors import ConfigError

__all__ = ["LANES", "Trace"]

LANES = ("rows", "modules", "compute", "results")
_MAX_WAITING = 4096  # spans whose events are not reached
_MAX_SPANS = 1_000_000  # in one file, about 200 MB
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Span:
    lane: str
    begin: Event
    end: Event
    name: str
    facts: dict[str, int | str]


class Trace:
    """Any thread may add spans. What goes wrong with the file is logged and ends the trace, never a batch."""

    def __init__(self, path: str | os.PathLike[str], device: Device, *, max_spans: int = _MAX_SPANS) -> None:
        """Raises ConfigError when the file cannot be written."""
        self._path, self._left = Path(path), max_spans
        self._clock = device.stream("trace")
        self._origin = self._clock.record()
        self._waiting: deque[_Span] = deque(maxlen=_MAX_WAITING)
        self._lock = threading.Lock()
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"the trace file {path} cannot be written ({error.strerror}); choose another") from error
        self._end = os.pwrite(self._file, b"[", 0)
        self._open = True
        self._write({"ph": "M", "name": "thread_name", "tid": i, "args": {"name": n}} for i, n in enumerate(LANES))

    def now(self) -> Event:
        """An event for work that runs on no stream."""
        return self._clock.record()

    def span(self, lane: str, begin: Event, end: Event, name: str, **facts: int | str) -> None:
        """Something ran on a lane from one event to another; either may be still to come."""
        with self._lock:
            self._waiting.append(_Span(lane, begin, end, name, facts))

    def flush(self) -> None:
        """Write the spans that are over."""
        with self._lock:
            waiting, over = list(self._waiting), []
            self._waiting.clear()
            for span in waiting:
                try:
                    if span.begin.done() and span.end.done():
                        over.append(self._event(span))
                    else:
                        self._waiting.append(span)
                except Exception as error:  # whoever waits for the work gets the error itself
                    _log.warning("a span of lane %s is left out of the trace: it failed with %s", span.lane, error)
            self._write(over)

    def close(self) -> None:
        """Write what is over, and nothing afterwards."""
        self.flush()
        with self._lock:
            if self._open:
                self._open = False
                os.close(self._file)

    def _event(self, span: _Span) -> dict[str, Any]:
        begin_s = span.begin.since_s(self._origin)
        duration_s = span.end.since_s(span.begin)
        return {
            "ph": "X",
            "name": span.name,
            "tid": LANES.index(span.lane),
            "ts": round(begin_s * 1e6, 1),
            "dur": round(duration_s * 1e6, 1),
            "args": span.facts,
        }

    def _write(self, events: Iterable[dict[str, Any]]) -> None:
        """Over the closing bracket, in one call with the next one, so that the file is whole before and after."""
        lines = [json.dumps(event | {"pid": 1, "cat": "lane"}) for event in events]
        if not self._open or not lines:
            return
        comma = "" if self._end == 1 else ","
        text = (comma + "\n" + ",\n".join(lines)).encode()
        try:
            os.pwrite(self._file, text + b"\n]\n", self._end)
        except OSError as error:
            self._stop(f"the file cannot be written: {error.strerror}")
            return
        self._end += len(text)
        self._left -= len(lines)
        if self._left <= 0:
            self._stop("it holds as many spans as it may")

    def _stop(self, why: str) -> None:
        _log.warning("the trace %s ends here: %s", self._path, why)
        self._open = False
        os.close(self._file)
