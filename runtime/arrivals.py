"""Made-up requests to simulate: when they arrive, of whom, how long they are. Seeded: the same numbers every time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.request_log import Offered
from vbert.errors import ConfigError

__all__ = ["ARRIVALS", "POPULARITY", "Traffic", "gaps_log", "make_requests"]

ARRIVALS = ("poisson", "bursts", "normal")
POPULARITY = ("zipf", "uniform", "one", "heavy")
_ZIPF_EXPONENT = 1.1
_BURST = 32  # requests of a burst, in the mean
_HEAVY_PART = 0.5
_SIGMA = 0.6  # of the logarithm of lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """arrivals: `poisson`; `bursts`, geometric numbers at one moment; or `normal`, gaps of Normal(M, M / 3) above 0,
    as FastPTM's. rate: requests a second in the mean. popularity of tenants: `zipf` (exponent 1.1), `uniform`, `one`,
    or `heavy`: one sends half of all, the others the rest alike. mean_tokens: of log-normal lengths, one input a
    request, at most max_tokens. batch_part: of requests with priority batch."""

    requests: int
    rate: float
    arrivals: str = "poisson"
    tenants: int = 100
    popularity: str = "zipf"
    mean_tokens: float = 32.0
    max_tokens: int = 256
    deadline_s: float | None = None
    batch_part: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.arrivals not in ARRIVALS:
            raise ConfigError(f"arrivals is {self.arrivals!r}; use one of {', '.join(ARRIVALS)}")
        if self.popularity not in POPULARITY:
            raise ConfigError(f"popularity is {self.popularity!r}; use one of {', '.join(POPULARITY)}")
        for name in ("requests", "rate", "tenants", "mean_tokens", "max_tokens"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ConfigError(f"deadline_s is {self.deadline_s}; it must be above 0")
        if not 0 <= self.batch_part <= 1:
            raise ConfigError(f"batch_part is {self.batch_part}; give a share from 0 to 1")


def make_requests(traffic: Traffic) -> list[Offered]:
    """By arrival; tenants are named t0, t1, ... from the most popular down."""
    rng = np.random.default_rng(traffic.seed)
    count = traffic.requests
    at_s = np.cumsum(_gaps_s(traffic, rng))
    weights = _weights(traffic)
    tenants = rng.choice(len(weights), count, p=weights / weights.sum())
    mu = np.log(traffic.mean_tokens) - _SIGMA**2 / 2
    lengths = np.clip(np.rint(rng.lognormal(mu, _SIGMA, count)), 3, traffic.max_tokens).astype(np.int64)
    priorities = np.where(rng.random(count) < traffic.batch_part, "batch", "interactive")
    names = [f"t{i}" for i in range(len(weights))]
    rows = zip(at_s.tolist(), tenants.tolist(), lengths.tolist(), priorities.tolist(), strict=True)
    return [Offered(at, names[i], (length,), traffic.deadline_s, priority) for at, i, length, priority in rows]


def gaps_log(path: Path, *, tokens: int, inputs: int, deadline_s: float | None) -> list[Offered]:
    """A file of FastPTM's form: a JSON list of [kind of task, seconds since the one before], each with so many inputs
    of so many tokens. Raises ConfigError."""
    try:
        value: Any = json.loads(path.read_text("utf-8"))
        gaps = [(str(kind), float(gap)) for kind, gap in value]
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no list of [kind, seconds] ({error}); give a trace of that form") from error
    at_s = np.cumsum([gap for _, gap in gaps]).tolist()
    return [Offered(at, kind, (tokens,) * inputs, deadline_s) for at, (kind, _) in zip(at_s, gaps, strict=True)]


def _gaps_s(traffic: Traffic, rng: np.random.Generator) -> NDArray[np.float64]:
    mean, count = 1 / traffic.rate, traffic.requests
    if traffic.arrivals == "poisson":
        return rng.exponential(mean, count)
    if traffic.arrivals == "normal":
        return _above_0(rng, mean, count)
    first = rng.random(count) < 1 / _BURST
    return np.where(first, rng.exponential(mean * _BURST, count), 0.0)


def _above_0(rng: np.random.Generator, mean: float, count: int) -> NDArray[np.float64]:
    """Drawn again until they are."""
    gaps = rng.normal(mean, mean / 3, count)
    while (wrong := gaps <= 0).any():
        gaps[wrong] = rng.normal(mean, mean / 3, int(wrong.sum()))
    return gaps


def _weights(traffic: Traffic) -> NDArray[np.float64]:
    count = 1 if traffic.popularity == "one" else traffic.tenants
    if traffic.popularity == "zipf":
        return np.arange(1, count + 1, dtype=np.float64) ** -_ZIPF_EXPONENT
    weights = np.ones(count)
    if traffic.popularity == "heavy" and count > 1:
        weights[0] = (count - 1) * _HEAVY_PART / (1 - _HEAVY_PART)
    return weights


def capacity(tokens_per_s: float, requests: Sequence[Offered]) -> float:
    """Requests a second of these that so many tokens a second are enough for."""
    return tokens_per_s * len(requests) / max(1, sum(request.tokens for request in requests))
