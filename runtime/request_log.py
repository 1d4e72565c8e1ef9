"""A log of requests, by which a server's day is simulated again: who asked when, for how much, and how long it took.

One JSON object a line. The first is about the log, the others are requests and batches; no texts. Times are seconds
from its start. Written by `vbert serve --record` (runtime/recorder.py), read by `vbert simulate --trace`.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from runtime.pace import Pace
from runtime.request import PRIORITIES
from vbert.errors import ConfigError, CorruptFile

__all__ = ["Computed", "Offered", "RequestLog", "batch_line", "head", "other_line", "read_log", "to_line", "write_log"]

_FORMAT = 2


class Offered(NamedTuple):
    """One request. at_s: from the start of the log. lengths: tokens of each input. deadline_s: from its arrival."""

    at_s: float
    tenant: str
    lengths: tuple[int, ...]
    deadline_s: float | None = None
    priority: str = "interactive"

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class Computed(NamedTuple):
    """One batch, self-tests left out. launched_s: when the lanes got it, ended_s: when its answers were there."""

    tokens: int
    inputs: int
    tenants: int
    launched_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class RequestLog:
    """about: what the first line says. requests: by arrival. total_s: that each took, NaN where it got no answer.
    unread: requests refused before they were tokenised, whose lengths nobody knows. batches: what was computed. others:
    when batches ended that tell nothing, such as canaries."""

    about: Mapping[str, Any]
    requests: list[Offered]
    total_s: list[float]
    unread: int
    batches: list[Computed]
    others: list[float]

    def pace(self, batch_s: Callable[[int, int, int], float]) -> Pace:
        """What batches took to what batch_s(tokens, inputs, tenants) tells. A batch takes from when it is launched, or
        the one before it ended, to its end."""
        ends = sorted([*(batch.ended_s for batch in self.batches), *self.others])
        measured = []
        for batch in self.batches:
            before = bisect_left(ends, batch.ended_s)
            begin_s = max(batch.launched_s, ends[before - 1] if before else 0.0)
            told_s = batch_s(batch.tokens, batch.inputs, batch.tenants)
            measured.append((batch.ended_s, batch.ended_s - begin_s, told_s))
        return Pace.of(measured)


def to_line(request: Offered, outcome: str, total_s: float | None) -> str:
    """outcome: `ok`, or the code of the error."""
    line: dict[str, Any] = {"at_s": round(request.at_s, 6), "tenant": request.tenant, "lengths": request.lengths}
    line |= {} if request.deadline_s is None else {"deadline_s": round(request.deadline_s, 6)}
    line |= {} if request.priority == PRIORITIES[0] else {"priority": request.priority}
    line |= {"outcome": outcome} | ({} if total_s is None else {"total_s": round(total_s, 6)})
    return json.dumps(line, separators=(",", ":")) + "\n"


def batch_line(batch: Computed) -> str:
    times = [round(batch.launched_s, 6), round(batch.ended_s, 6)]
    return json.dumps({"batch": [*batch[:3], *times]}, separators=(",", ":")) + "\n"


def other_line(ended_s: float) -> str:
    """A batch that tells nothing of how long batches take."""
    return json.dumps({"other": round(ended_s, 6)}) + "\n"


def head(about: Mapping[str, Any]) -> str:
    """The first line."""
    return json.dumps({"request_log": _FORMAT} | dict(about)) + "\n"


def write_log(path: Path, requests: Iterable[Offered], about: Mapping[str, Any]) -> None:
    """Of requests nobody has served yet."""
    with path.open("w", encoding="utf-8") as file:
        file.write(head(about))
        file.writelines(to_line(request, "", None) for request in requests)


def read_log(path: Path) -> RequestLog:
    """Raises ConfigError when it cannot be read, CorruptFile naming the line that is no request. A last line that was
    cut is left out."""
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the request log {path} cannot be read ({error}); give one of --record") from error
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    about = _parsed(path, 1, lines[0] if lines else "")
    if about.get("request_log") != _FORMAT:
        raise CorruptFile(f"{path} is no request log of format {_FORMAT}; give one that `vbert serve --record` wrote")
    parsed = [(i, _parsed(path, i, line)) for i, line in enumerate(lines[1:], 2)]
    batches = [_batch(path, i, line["batch"]) for i, line in parsed if "batch" in line]
    others = [float(line["other"]) for _, line in parsed if "other" in line]
    read = [_request(path, i, line) for i, line in parsed if "batch" not in line and "other" not in line]
    known = sorted((each for each in read if each[0].lengths), key=lambda each: each[0].at_s)
    requests, total_s = [request for request, _ in known], [seconds for _, seconds in known]
    return RequestLog(about, requests, total_s, unread=len(read) - len(known), batches=batches, others=others)


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise CorruptFile(f"line {number} of {path} is not JSON ({error}); give a whole request log") from error
    if not isinstance(value, dict):
        raise CorruptFile(f"line {number} of {path} is no JSON object; give a whole request log")
    return value


def _batch(path: Path, number: int, value: Any) -> Computed:
    try:
        tokens, inputs, tenants, launched_s, ended_s = value
        batch = Computed(int(tokens), int(inputs), int(tenants), float(launched_s), float(ended_s))
        if min(batch[:3]) < 1 or not 0 <= batch.launched_s < batch.ended_s:
            raise ValueError(f"it says {value}")
        return batch
    except (TypeError, ValueError) as error:
        raise CorruptFile(f"line {number} of {path} is no batch ({error!r}); give a whole request log") from error


def _request(path: Path, number: int, line: dict[str, Any]) -> tuple[Offered, float]:
    try:
        deadline_s = line.get("deadline_s")
        request = Offered(
            float(line["at_s"]),
            str(line["tenant"]),
            tuple(int(length) for length in line["lengths"]),
            None if deadline_s is None else float(deadline_s),
            str(line.get("priority", PRIORITIES[0])),
        )
        if min(request.lengths, default=1) < 1 or request.priority not in PRIORITIES or not request.at_s >= 0:
            raise ValueError(f"it says {line}")
        return request, float(line["total_s"]) if line.get("outcome") == "ok" else math.nan
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"line {number} of {path} is no request ({error!r}); give a whole request log") from error
