"""Pure policy: which tenant modules leave memory so that another one fits. Imports neither asyncio nor torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Lru", "ResidencyPolicy", "Resident"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """One module in memory. `pinned`: a batch is using it, or it was loaded for a request that has not run yet."""

    digest: str
    num_bytes: int
    last_used_s: float
    pinned: bool


class ResidencyPolicy(Protocol):
    def evict(self, resident: Iterable[Resident], *, free_bytes: int, need_bytes: int) -> tuple[str, ...] | None:
        """Digests to evict so that `need_bytes` fit, given every resident module, the longest unused one first.

        None: not now, because too much is pinned; ask again when something was unpinned.
        """
        ...


@dataclass(frozen=True, slots=True)
class Lru:
    """Evict the least recently used modules, as few as are enough. O(victims + pinned ones before them)."""

    def evict(self, resident: Iterable[Resident], *, free_bytes: int, need_bytes: int) -> tuple[str, ...] | None:
        victims: list[str] = []
        for module in resident:
            if free_bytes >= need_bytes:
                break
            if not module.pinned:
                victims.append(module.digest)
                free_bytes += module.num_bytes
        return tuple(victims) if free_bytes >= need_bytes else None
