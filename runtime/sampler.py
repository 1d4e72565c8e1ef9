"""Seconds of runs by size: the points of a curve, measured in several passes.

A machine that others share is slow for a second and fast for the next. The repeats of a point are therefore spread over
passes through all curves, so that such a second moves one repeat of many points and not every repeat of one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from runtime.clock import Clock
from runtime.cost import Curve, Point

__all__ = ["Repeats", "Sampler", "Trial"]

_TICK_S = 1e-9  # a clock may not have moved
_HOPELESS = 1.5  # times slower at its first run, and a thread count is measured no further


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """Of one point, in each of the passes: at least `least`, then as many as point_s is enough for, up to `most`.

    largest_s: a run that takes longer is not repeated; one that should take longer is left out, and all larger ones
    with it, but for the second of a curve.
    """

    least: int
    most: int
    point_s: float
    largest_s: float
    passes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What makes a curve. runs: by size. thread_counts: of which the fastest counts. before: what happens untimed
    before each repeat of a size."""

    runs: Mapping[int, Callable[[], object]]
    thread_counts: Sequence[int] = (1,)
    before: Mapping[int, Callable[[], None]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Sample:
    """One point so far."""

    size: int
    threads: int
    seconds: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def point(self) -> Point:
        p25, p50, p75 = statistics.quantiles(self.seconds * 2, n=4, method="inclusive")  # doubled: one is too few
        spread = round((p75 - p25) / p50, 4)
        return Point(size=self.size, seconds=p50, spread=spread, repeats=len(self.seconds), threads=self.threads)


class Sampler:
    """Sets the number of torch's threads; whoever made it puts it back."""

    def __init__(self, repeats: Repeats, clock: Clock) -> None:
        self._repeats, self._clock = repeats, clock

    def curves(self, trials: Mapping[str, Trial], told: Callable[[str, int, int], None]) -> dict[str, Curve]:
        """told: what is measured, how many curves are done, counted anew in each pass, and of how many."""
        samples: dict[str, list[list[_Sample]]] = {}
        total = len(trials) * self._repeats.passes
        for done in range(total):
            name = list(trials)[done % len(trials)]
            told(name, done, total)
            if name in samples:
                self._again(trials[name], [sample for of_size in samples[name] for sample in of_size])
            else:
                samples[name] = self._first(trials[name])
        return {name: Curve([_fastest(of_size).point() for of_size in found]) for name, found in samples.items()}

    def _first(self, trial: Trial) -> list[list[_Sample]]:
        """Which sizes are measured, each on all numbers of threads that are not hopeless."""
        found: list[list[_Sample]] = []
        for size, run in sorted(trial.runs.items()):
            # Two at least: the time of a few tokens tells little of many.
            if len(found) > 1:
                last = _fastest(found[-1])
                if last.median_s * size / last.size > self._repeats.largest_s:
                    break
            of_size: list[_Sample] = []
            for threads in trial.thread_counts:
                self._try(size, run, trial.before.get(size, _nothing), threads, of_size)
            found.append(of_size)
        return found

    def _try(
        self, size: int, run: Callable[[], object], prepare: Callable[[], None], threads: int, others: list[_Sample]
    ) -> None:
        """One run that does not count, unless it is a long one, then repeats; to `others` unless it is hopeless."""
        torch.set_num_threads(threads)
        first_s = self._seconds(run, prepare)
        if not others or first_s <= _HOPELESS * _fastest(others).median_s:
            seconds = [first_s] if first_s > self._repeats.largest_s else self._several(run, prepare)
            others.append(_Sample(size, threads, seconds))

    def _again(self, trial: Trial, samples: Sequence[_Sample]) -> None:
        for sample in samples:
            if sample.seconds[0] <= self._repeats.largest_s:
                torch.set_num_threads(sample.threads)
                run, prepare = trial.runs[sample.size], trial.before.get(sample.size, _nothing)
                self._seconds(run, prepare)
                sample.seconds.extend(self._several(run, prepare))

    def _several(self, run: Callable[[], object], prepare: Callable[[], None]) -> list[float]:
        repeats = self._repeats
        seconds = [self._seconds(run, prepare) for _ in range(repeats.least)]
        while len(seconds) < repeats.most and sum(seconds) < repeats.point_s:
            seconds.append(self._seconds(run, prepare))
        return seconds

    def _seconds(self, run: Callable[[], object], prepare: Callable[[], None]) -> float:
        prepare()
        begin_s = self._clock.now_s()
        run()
        return max(self._clock.now_s() - begin_s, _TICK_S)


def _fastest(samples: Sequence[_Sample]) -> _Sample:
    return min(samples, key=lambda sample: sample.median_s)


def _nothing() -> None:
    pass
