"""`BatchDeltas`: what the tenants of one batch change, asked for site by site by the encoder.

One entry per arena class present in the batch, never one per tenant: the number of operator calls of a layer does not
grow with the number of tenants. Order at one linear: input scale; shared product and bias; + low rank + sparse; then
scale and shift (docs/architecture.md). Classes that no tenant has both of touch different rows, so their operators may
run side by side; those of one tenant never do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from itertools import combinations

import numpy as np
from torch import Tensor

from vbert.arena import ArenaClass, ResidentTenant
from vbert.batch import Segments
from vbert.peft.affine import changes_output, replace_norm, scale_and_shift, scale_input, scales_input
from vbert.peft.bottleneck import add_bottleneck
from vbert.peft.low_rank import add_low_rank
from vbert.peft.sparse import add_sparse
from vbert.peft.use import ClassUse, any_at
from vbert.side_streams import Work

__all__ = ["BatchDeltas"]

_Uses = dict[str, list[ClassUse]]  # by kind


class BatchDeltas:
    """The arena classes a batch uses, by kind, each with the rows of its tenants."""

    def __init__(self, tenants: Sequence[ResidentTenant | None], starts: Sequence[int]) -> None:
        """tenants: [S], None for the bare backbone.  starts: [S + 1] rows, segment s being starts[s]:starts[s + 1]."""
        members: dict[ArenaClass, list[tuple[int, int, int]]] = {}
        for s, tenant in enumerate(tenants):
            for arena_class, slot in tenant.slots if tenant and not tenant.header.is_whole else ():
                members.setdefault(arena_class, []).append((slot, starts[s], starts[s + 1]))
        self._uses: _Uses = {"low_rank": [], "bottleneck": [], "affine": [], "sparse": []}
        for arena_class, rows in members.items():
            slot, start, stop = np.array(rows, np.int64).T
            segments = Segments(slot, start, stop)
            if len(segments):
                self._uses[arena_class.kind].append(ClassUse(arena_class, segments))
        self._parts: Sequence[_Uses] = ()  # the uses of each group, where they may run side by side
        self._run: Callable[[Sequence[Work]], None] | None = None
        self.num_streams = 1

    @property
    def uses(self) -> list[ClassUse]:
        """Every arena class of the batch with its rows, in the order of packing."""
        return [use for uses in self._uses.values() for use in uses]

    @cached_property
    def _sites(self) -> frozenset[tuple[int, str]]:
        """Layers and sites where any class has a delta: elsewhere there is nothing to ask for."""
        return frozenset().union(*(use.arena_class.at for use in self.uses))

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """The group of each of `uses`, named by its first: no row belongs to two groups."""
        starts = [set(use.segments.start.tolist()) for use in self.uses]  # two segments are the same rows, or none are
        groups = list(range(len(starts)))
        for i, j in combinations(groups, 2):
            if starts[i] & starts[j]:
                first, other = sorted((groups[i], groups[j]))
                groups = [first if group == other else group for group in groups]
        return tuple(groups)

    @property
    def num_groups(self) -> int:
        return len(set(self.groups))

    def with_segments(self, segments: Sequence[Segments]) -> BatchDeltas:
        """The same classes in the same groups, each with other rows."""
        other = BatchDeltas((), (0,))
        for use, rows in zip(self.uses, segments, strict=True):
            other._uses[use.arena_class.kind].append(ClassUse(use.arena_class, rows))
        other.groups = self.groups
        return other

    def side_by_side(self, num_streams: int, run: Callable[[Sequence[Work]], None]) -> BatchDeltas:
        """The same, whose groups run on so many streams.

        run: gets the work of each stream at one site, and has it done before what is issued next.
        """
        parts: dict[int, _Uses] = {group: {kind: [] for kind in self._uses} for group in self.groups}
        for use, group in zip(self.uses, self.groups, strict=True):
            parts[group][use.arena_class.kind].append(use)
        other = copy(self)
        other._parts, other._run, other.num_streams = [*parts.values()], run, num_streams
        return other

    def before_linear(self, layer: int, site: str, x: Tensor, *, in_place: bool = False) -> Tensor:
        """x [T, H_in] with the input scales of a site; a copy where one applies, unless `in_place`."""
        if (layer, site) not in self._sites:
            return x

        def has_one(uses: _Uses) -> bool:
            return scales_input(uses["affine"], layer, site)

        if has_one(self._uses):
            x = x if in_place else x.clone()
            self._each(has_one, lambda uses: scale_input(uses["affine"], layer, site, x))
        return x

    def after_linear(self, layer: int, x: Tensor, outs: Mapping[str, Tensor]) -> None:
        """Finish the linears in `outs` (site -> [T, H_out], shared bias in), which all read x, in place."""
        if not any((layer, site) in self._sites for site in outs):
            return

        def has_some(uses: _Uses) -> bool:
            adds = any_at((*uses["low_rank"], *uses["sparse"]), layer, outs)
            return adds or changes_output(uses["affine"], layer, outs)

        def finish(uses: _Uses) -> None:
            add_low_rank(uses["low_rank"], layer, x, outs)
            add_sparse(uses["sparse"], layer, x, outs)
            scale_and_shift(uses["affine"], layer, outs)

        self._each(has_some, finish)

    def bottleneck_rows(self, layer: int, site: str) -> slice | None:
        """A range that holds every row with a bottleneck at this site; None where there is none."""
        if (layer, site) not in self._sites:
            return None
        used = [use.segments for use in self._uses["bottleneck"] if use.at(layer, site)]
        if not used:
            return None
        return slice(min(int(s.start[0]) for s in used), max(int(s.stop[-1]) for s in used))

    def bottleneck(self, layer: int, site: str, tap: Tensor, out: Tensor) -> None:
        """Add the bottlenecks of a site, reading `tap` [T, H], into `out` [T, H]."""
        if (layer, site) in self._sites:
            self._each(
                lambda uses: any_at(uses["bottleneck"], layer, (site,)),
                lambda uses: add_bottleneck(uses["bottleneck"], layer, site, tap, out),
            )

    def norm(self, layer: int, site: str, rows: Tensor, out: Tensor, eps: float) -> None:
        """Overwrite `out` [T, H] where a tenant has its own LayerNorm; `rows` is what enters the LayerNorm."""
        if (layer, site) in self._sites:
            self._each(
                lambda uses: any_at(uses["affine"], layer, (site,)),
                lambda uses: replace_norm(uses["affine"], layer, site, rows, out, eps),
            )

    def _each(self, has_some: Callable[[_Uses], bool], work: Callable[[_Uses], None]) -> None:
        """Do the work of all uses: side by side where several groups have some at this site."""
        busy = [part for part in self._parts if has_some(part)]
        count = min(len(busy), self.num_streams)
        if count > 1 and self._run is not None:
            self._run([partial(_all, work, busy[i::count]) for i in range(count)])
        else:
            work(self._uses)


def _all(work: Callable[[_Uses], None], parts: Sequence[_Uses]) -> None:
    for part in parts:
        work(part)
