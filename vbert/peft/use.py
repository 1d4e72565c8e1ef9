"""`ClassUse`: which rows of a batch use which slots of one arena class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from vbert.arena import ArenaClass
from vbert.batch import Segments

__all__ = ["ClassUse", "any_at"]


@dataclass(frozen=True, slots=True)
class ClassUse:
    arena_class: ArenaClass
    segments: Segments

    def at(self, layer: int, site: str) -> tuple[str, dict[str, Tensor]] | None:
        """The variant and the slot views of a site of a layer, or None where this class has no delta there."""
        return self.arena_class.at.get((layer, site))


def any_at(uses: Iterable[ClassUse], layer: int, sites: Iterable[str]) -> bool:
    """Whether one of the classes has a delta at one of the sites of a layer."""
    return any(use.at(layer, site) is not None for use in uses for site in sites)
