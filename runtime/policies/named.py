"""Policies by name, for `vbert serve --policy` and `vbert simulate --policy`."""

from __future__ import annotations

from collections.abc import Callable

from runtime.cost import CostModel
from runtime.policies.orders import Arrival, EarliestDeadline, FairShares, ResponseRatio, ShortestFirst, UrgentFirst
from runtime.policies.pooled import Pooled, ProfileCosts
from runtime.policies.pools import POOL_POLICIES
from runtime.policies.token_budget import TokenBudget
from runtime.scheduler import BatchPolicy
from vbert.errors import ConfigError

__all__ = ["DEFAULT", "POLICIES", "POOLED", "batch_policy", "check_policy"]

DEFAULT = "fair"
POLICIES: dict[str, Callable[[], BatchPolicy]] = {
    "fair": lambda: TokenBudget(order=FairShares(), in_time=True),
    "urgent": lambda: TokenBudget(order=UrgentFirst()),
    "fcfs": lambda: TokenBudget(order=Arrival(), packing=False),
    "sjf": lambda: TokenBudget(order=ShortestFirst(), packing=False),
    "edf": lambda: TokenBudget(order=EarliestDeadline(), packing=False),
    "hrrn": lambda: TokenBudget(order=ResponseRatio(), packing=False),
    "fcfs-packing": lambda: TokenBudget(order=Arrival()),
    "sjf-packing": lambda: TokenBudget(order=ShortestFirst()),
    "edf-packing": lambda: TokenBudget(order=EarliestDeadline()),
    "hrrn-packing": lambda: TokenBudget(order=ResponseRatio(), window_s=0.1),
}


POOLED = tuple(f"pool-{name}" for name in POOL_POLICIES)


def batch_policy(name: str, cost: CostModel | None = None, *, max_batch_tokens: int = 4096) -> BatchPolicy:
    """cost: those of POOLED need it. Raises ConfigError."""
    if name in POLICIES:
        return POLICIES[name]()
    check_policy(name)
    if cost is None:
        raise ConfigError(f"the policy {name!r} needs a profile; give one of `vbert profile`, or use {DEFAULT!r}")
    return Pooled(policy=POOL_POLICIES[name.removeprefix("pool-")], costs=ProfileCosts(cost, max_batch_tokens))


def check_policy(name: str) -> None:
    """Raises ConfigError for a name that there is not."""
    if name not in (*POLICIES, *POOLED):
        raise ConfigError(f"the policy is {name!r}; use one of {', '.join((*POLICIES, *POOLED))}")
