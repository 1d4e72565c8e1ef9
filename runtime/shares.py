"""Who had how much: a virtual token counter for each tenant, by which requests are ordered. Pure.

A request gets a tag when it arrives: where its tenant's counter stands, which then moves on by tokens / weight. In the
order of tags, tenants that always have something waiting are served in proportion to their weights; one that comes
later, or comes back, starts where the others stand, so time without requests is neither saved up nor held against it.

Source: start-time fair queueing (Goyal, Vin, Cheng 1996); counted in tokens as in the virtual token counter of Sheng et
al. 2024 (OSDI).
"""

from __future__ import annotations

__all__ = ["Shares"]

_KEPT = 1024  # counters that are behind are forgotten when there are twice as many as after the last time, from so many


class Shares:
    """now: where those stand who are served, in tokens of a tenant of weight 1. It never falls."""

    def __init__(self) -> None:
        self.now = 0.0
        self._until: dict[str, float] = {}
        self._forget_at = _KEPT

    def tag(self, tenant: str) -> float:
        """That a request would get if it came now."""
        return max(self.now, self._until.get(tenant, 0.0))

    def join(self, tenant: str, tokens: int, weight: float) -> float:
        """The tag of a request that arrives."""
        tag = self.tag(tenant)
        self._until[tenant] = tag + tokens / weight
        if len(self._until) > self._forget_at:
            self._until = {name: until for name, until in self._until.items() if until > self.now}
            self._forget_at = max(_KEPT, 2 * len(self._until))
        return tag

    def refund(self, tenant: str, tokens: int, weight: float) -> None:
        """Of a request that left before they were computed."""
        if tenant in self._until:
            self._until[tenant] -= tokens / weight

    def served(self, lowest: float) -> None:
        """A request is served; the lowest tag of those that were ready."""
        self.now = max(self.now, lowest)
