"""`BatchDeltas`: what the tenants of one batch change, asked for site by site by the encoder.

One entry per arena class present in the batch, never one per tenant: the number of operator calls of a layer does not
grow with the number of tenants. Order at one linear: input scale; shared product and bias; + low rank + sparse; then
scale and shift (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from vbert.arena import ArenaClass, ResidentTenant
from vbert.batch import Segments
from vbert.peft.affine import replace_norm, scale_and_shift, scale_input
from vbert.peft.bottleneck import add_bottleneck
from vbert.peft.low_rank import add_low_rank
from vbert.peft.sparse import add_sparse
from vbert.peft.use import ClassUse

__all__ = ["BatchDeltas"]


class BatchDeltas:
    """The arena classes a batch uses, by kind, each with the rows of its tenants."""

    def __init__(self, tenants: Sequence[ResidentTenant | None], starts: Sequence[int]) -> None:
        """tenants: [S], None for the bare backbone.  starts: [S + 1] rows, segment s being starts[s]:starts[s + 1]."""
        members: dict[ArenaClass, list[tuple[int, int, int]]] = {}
        for s, tenant in enumerate(tenants):
            for arena_class, slot in tenant.slots if tenant and not tenant.header.is_whole else ():
                members.setdefault(arena_class, []).append((slot, starts[s], starts[s + 1]))
        self._uses: dict[str, list[ClassUse]] = {"low_rank": [], "bottleneck": [], "affine": [], "sparse": []}
        for arena_class, rows in members.items():
            slot, start, stop = np.array(rows, np.int64).T
            segments = Segments(slot, start, stop)
            if len(segments):
                self._uses[arena_class.kind].append(ClassUse(arena_class, segments))

    @property
    def uses(self) -> list[ClassUse]:
        """Every arena class of the batch with its rows, in the order of packing."""
        return [use for uses in self._uses.values() for use in uses]

    def with_segments(self, segments: Sequence[Segments]) -> BatchDeltas:
        """The same classes, each with other rows."""
        other = BatchDeltas((), (0,))
        for use, rows in zip(self.uses, segments, strict=True):
            other._uses[use.arena_class.kind].append(ClassUse(use.arena_class, rows))
        return other

    def before_linear(self, layer: int, site: str, x: Tensor, *, in_place: bool = False) -> Tensor:
        """x [T, H_in] with the input scales of a site; a copy where one applies, unless `in_place`."""
        return scale_input(self._uses["affine"], layer, site, x, in_place=in_place)

    def after_linear(self, layer: int, x: Tensor, outs: Mapping[str, Tensor]) -> None:
        """Finish the linears in `outs` (site -> [T, H_out], shared bias in), which all read x, in place."""
        add_low_rank(self._uses["low_rank"], layer, x, outs)
        add_sparse(self._uses["sparse"], layer, x, outs)
        scale_and_shift(self._uses["affine"], layer, outs)

    def bottleneck_rows(self, layer: int, site: str) -> slice | None:
        """A range that holds every row with a bottleneck at this site; None where there is none."""
        used = [use.segments for use in self._uses["bottleneck"] if use.at(layer, site)]
        if not used:
            return None
        return slice(min(int(s.start[0]) for s in used), max(int(s.stop[-1]) for s in used))

    def bottleneck(self, layer: int, site: str, tap: Tensor, out: Tensor) -> None:
        """Add the bottlenecks of a site, reading `tap` [T, H], into `out` [T, H]."""
        add_bottleneck(self._uses["bottleneck"], layer, site, tap, out)

    def norm(self, layer: int, site: str, rows: Tensor, out: Tensor, eps: float) -> None:
        """Overwrite `out` [T, H] where a tenant has its own LayerNorm; `rows` is what enters the LayerNorm."""
        replace_norm(self._uses["affine"], layer, site, rows, out, eps)
