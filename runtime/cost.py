"""What things cost: seconds by operation, size and tier, measured on one device and interpolated. Pure: no torch.

A `CostModel` is a few curves through measured points; runtime/profiler.py measures them, runtime/profile_file.py keeps
them. Policies ask it before anything has run; what is learned meanwhile corrects it (runtime/throughput.py).

| curve | size | case |
| --- | --- | --- |
| forward/LENGTH | tokens of a batch | each of its sequences has LENGTH tokens |
| with/KIND/SIZE/N | tokens of a batch | N tenants have modules of that kind and size; sequences have 32 tokens |
| load/warm, load/cold | bytes of a module in memory | its file is in the page cache; it is on the disk only |
| swap | bytes of a model's whole weights in memory | the encoder of another tenant with weights of its own |
| upload | bytes, host to device | only where there is a device |
| gather_rows/WIDTH | rows of a table in memory | rows of WIDTH numbers |
| local | n-grams through the local layers of a skip backbone | only where there is one |
| self_test | modules whose self-tests are replayed in one batch | |
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate, pairwise
from operator import itemgetter
from statistics import median
from typing import Any

from vbert.errors import ConfigError, CorruptFile

__all__ = ["FORMAT_VERSION", "TYPICAL_LENGTH", "Conditions", "CostModel", "Curve", "Point"]

FORMAT_VERSION = 1
TYPICAL_LENGTH = 32  # tokens of a short text, where nobody says better
_REMEDY = "run `vbert profile` here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a profile holds for. device: model of the CPU or GPU. threads: the most the compute lane uses.
    wait_policy: OMP_WAIT_POLICY, `default` where it is not set. layers, hidden, ffn: shape of the backbone;
    local_layers: of its skip part."""

    device: str
    threads: int
    wait_policy: str
    dtype: str
    torch: str
    vbert: str
    layers: int
    hidden: int
    ffn: int
    local_layers: int = 0

    def check(self, here: Conditions, where: str) -> None:
        """Raises ConfigError naming everything in which `here` differs. where: which profile this is, for people."""
        names = [field.name for field in fields(self)]
        differ = [name for name in names if getattr(self, name) != getattr(here, name)]
        if differ:
            listed = ", ".join(f"{name} {getattr(self, name)!r} (here {getattr(here, name)!r})" for name in differ)
            raise ConfigError(f"the profile {where} was measured with {listed}; {_REMEDY}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement. seconds: median of the repeats; spread: (p75 - p25) / p50; threads: of the lane, at this size
    the fastest number."""

    size: float
    seconds: float
    spread: float
    repeats: int
    threads: int


class Curve:
    """Seconds over size: linear between the measured points, and never falling.

    What disturbs a measurement makes it longer, so where a larger size took less time, that is the better number for
    the smaller one. Outside the points: below, as long as the smallest; above, in proportion to the largest, which is
    an upper bound where a part of the cost is fixed.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        """points: at least one, sizes above 0 and ascending. Raises CorruptFile."""
        sizes = [point.size for point in points]
        if not sizes or sizes[0] <= 0 or any(b <= a for a, b in pairwise(sizes)):
            raise CorruptFile(f"sizes of a profile are {sizes}, they must be above 0 and ascending; {_REMEDY}")
        if not all(0 < point.seconds < float("inf") for point in points):
            raise CorruptFile(f"seconds of a profile are {[p.seconds for p in points]}, not all above 0; {_REMEDY}")
        self.points = tuple(points)
        self._sizes = sizes
        self._seconds = list(accumulate((point.seconds for point in reversed(points)), min))[::-1]

    def seconds(self, size: float) -> float:
        sizes, seconds = self._sizes, self._seconds
        if size <= sizes[0]:
            return seconds[0]
        if size >= sizes[-1]:
            return seconds[-1] * size / sizes[-1]
        i = bisect_left(sizes, size)
        return _between(size, sizes[i - 1], seconds[i - 1], sizes[i], seconds[i])


@dataclass(frozen=True, slots=True, eq=False)
class CostModel:
    """The curves of one device, by the names above. Every answer is in seconds."""

    conditions: Conditions
    curves: Mapping[str, Curve]
    _forwards: list[tuple[int, Curve]] = field(init=False, default_factory=list)  # by length, the shortest first
    _modules: dict[str, dict[int, dict[int, Curve]]] = field(init=False, default_factory=dict)  # kind, size, tenants

    def __post_init__(self) -> None:
        named = [(name.removeprefix("forward/"), curve) for name, curve in self.curves.items()]
        self._forwards.extend(sorted((int(name), curve) for name, curve in named if name.isdigit()))
        for name, curve in self.curves.items():
            match name.split("/"):
                case ["with", kind, size, tenants] if size.isdigit() and tenants.isdigit():
                    self._modules.setdefault(kind, {}).setdefault(int(size), {})[int(tenants)] = curve

    def forward_s(self, tokens: int, length: float = TYPICAL_LENGTH) -> float:
        """A batch of `tokens` in sequences of `length`. Between measured lengths linear, as attention is per token;
        below the shortest as that one, above the longest along the last two."""
        curves = self._forwards
        if length <= curves[0][0] or len(curves) == 1:
            return curves[0][1].seconds(tokens)
        i = min(bisect_left(curves, length, key=itemgetter(0)), len(curves) - 1)
        (shorter, below), (longer, above) = curves[i - 1], curves[i]
        seconds = above.seconds(tokens)
        told = _between(length, shorter, below.seconds(tokens), longer, seconds)
        return max(told, seconds) if length > longer else told

    @property
    def module_kinds(self) -> tuple[str, ...]:
        """Those `module_s` knows."""
        return tuple(self._modules)

    def module_s(self, kind: str, tokens: int, tenants: int = 1, size: int = 8) -> float:
        """What modules add to a batch in which they change `tokens`, of so many tenants of that kind.

        size: the rank of low_rank and bottleneck, how many of a thousand weights sparse changes; affine has none.
        Between what was measured linear, above it along the last two; in fewer tokens than were measured as much as in
        those. Raises ConfigError for a kind that was not measured.
        """
        if kind not in self._modules:
            known = ", ".join(self._modules) or "none"
            raise ConfigError(f"the profile knows modules of kind {known}, not {kind!r}; {_REMEDY}, without --quick")
        lengths = [length for length, _ in self._forwards]
        bare = self._forwards[bisect_left(lengths, min(TYPICAL_LENGTH, lengths[-1]))][1]

        def more_s(curve: Curve) -> float:
            least = max(tokens, curve.points[0].size)
            return max(0.0, curve.seconds(least) - bare.seconds(least))

        by_size = {
            n: _at(tenants, {count: more_s(curve) for count, curve in curves.items()})
            for n, curves in self._modules[kind].items()
        }
        return max(0.0, _at(size, by_size))

    def load_s(self, num_bytes: int, tier: str = "warm") -> float:
        """Bringing in a module that takes `num_bytes` in memory. tier: `warm`, its file is in the page cache, or
        `cold`, it is on the disk only."""
        return self._curve(f"load/{tier}").seconds(num_bytes)

    def upload_s(self, num_bytes: int) -> float:
        """Host to device; 0 where there is no device."""
        return self.curves["upload"].seconds(num_bytes) if "upload" in self.curves else 0.0

    @property
    def weights_bytes(self) -> int | None:
        """Of a tenant with whole weights of its own, in memory; None where they were not measured."""
        return round(self.curves["swap"].points[-1].size) if "swap" in self.curves else None

    def swap_s(self, tier: str = "memory") -> float:
        """A change to another tenant with whole weights of its own. tier: where these are: `memory`, that of the device
        where there is one; `host`, from which they are uploaded; `warm` or `cold`, as `load_s` has it.

        Raises ConfigError where it was not measured.
        """
        num_bytes = self.weights_bytes
        if num_bytes is None:
            raise ConfigError(f"the profile does not know whole weights; {_REMEDY}, without --quick")
        views_s = self.curves["swap"].seconds(num_bytes)
        if tier == "memory":
            return views_s
        loaded_s = 0.0 if tier == "host" else self.load_s(num_bytes, tier)
        return views_s + self.upload_s(num_bytes) + loaded_s

    def gather_s(self, rows: int) -> float:
        """Rows of the backbone's width, gathered from a table in memory."""
        return self._curve(f"gather_rows/{self.conditions.hidden}").seconds(rows)

    def local_s(self, ngrams: int) -> float:
        """So many n-grams through the local layers of a skip backbone."""
        return self._curve("local").seconds(ngrams)

    def self_test_s(self, modules: int = 1) -> float:
        """Replaying the self-tests of so many modules in one batch."""
        return self._curve("self_test").seconds(modules)

    def batch_s(self, tokens: int, inputs: int, tenants: int = 1, module: tuple[str, int] | None = None) -> float:
        """A batch of so many inputs of about one length, of so many tenants, each with a module of that kind and
        size; None: of the bare backbone."""
        bare_s = self.forward_s(tokens, tokens / max(1, inputs))
        return bare_s if module is None else bare_s + self.module_s(module[0], tokens, tenants, module[1])

    @classmethod
    def on_a_line(cls, tokens_per_s: float, fixed_s: float) -> CostModel:
        """Of no machine: a batch takes fixed_s and so long a token, whatever the lengths. Loads are those of an SSD."""

        def curve(per_s: float, begin_s: float) -> Curve:
            return Curve(
                [Point(size=n, seconds=begin_s + n / per_s, spread=0, repeats=0, threads=1) for n in (1, 1e12)]
            )

        curves = {f"forward/{TYPICAL_LENGTH}": curve(tokens_per_s, fixed_s)}
        curves |= {f"load/{tier}": curve(1e9, 0.0005) for tier in ("warm", "cold")}
        none = Conditions(
            device="none", threads=0, wait_policy="", dtype="", torch="", vbert="", layers=0, hidden=0, ffn=0
        )
        return cls(none, curves)

    @property
    def noise(self) -> float:
        """Median spread of all points: 0.05 is a quiet machine."""
        return median(point.spread for curve in self.curves.values() for point in curve.points)

    def to_json(self) -> dict[str, Any]:
        curves = {name: [asdict(point) for point in curve.points] for name, curve in self.curves.items()}
        return {
            "format": FORMAT_VERSION,
            "conditions": asdict(self.conditions),
            "noise": round(self.noise, 4),
            "curves": curves,
        }

    @classmethod
    def from_json(cls, value: Any) -> CostModel:
        """Raises CorruptFile when it is not what `to_json` gave, ConfigError for another format version."""
        try:
            if value["format"] != FORMAT_VERSION:
                raise ConfigError(
                    f"the profile has format {value['format']!r}, this version reads {FORMAT_VERSION}; {_REMEDY}"
                )
            curves = {
                str(name): Curve([Point(**point) for point in points]) for name, points in value["curves"].items()
            }
            model = cls(Conditions(**value["conditions"]), curves)
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptFile(f"the profile is malformed ({error!r}); {_REMEDY}") from error
        for name in ("load/warm", "load/cold", "self_test", f"gather_rows/{model.conditions.hidden}"):
            model._curve(name)
        if not model._forwards:
            raise CorruptFile(f"the profile has no curve 'forward/LENGTH', it has {', '.join(model.curves)}; {_REMEDY}")
        return model

    def _curve(self, name: str) -> Curve:
        if name not in self.curves:
            raise CorruptFile(f"the profile has no curve {name!r}, it has {', '.join(self.curves)}; {_REMEDY}")
        return self.curves[name]


def _at(x: float, values: Mapping[int, float]) -> float:
    """Of values at some places: between two linear, below the first as that one, above the last along the last two."""
    places = sorted(values)
    if x <= places[0] or len(places) == 1:
        return values[places[0]]
    i = min(bisect_left(places, x), len(places) - 1)
    low, high = places[i - 1], places[i]
    return _between(x, low, values[low], high, values[high])


def _between(x: float, x0: float, y0: float, x1: float, y1: float) -> float:
    """On the line through both points."""
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
