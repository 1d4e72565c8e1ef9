"""Policies by name, for `vbert serve --policy` and `vbert simulate --policy`."""

from __future__ import annotations

from collections.abc import Callable

from runtime.policies.orders import Arrival, EarliestDeadline, FairShares, ResponseRatio, ShortestFirst, UrgentFirst
from runtime.policies.token_budget import TokenBudget
from runtime.scheduler import BatchPolicy
from vbert.errors import ConfigError

__all__ = ["DEFAULT", "POLICIES", "batch_policy"]

DEFAULT = "fair"
POLICIES: dict[str, Callable[[], BatchPolicy]] = {
    "fair": lambda: TokenBudget(order=FairShares(), hopeless=False),
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


def batch_policy(name: str) -> BatchPolicy:
    """Raises ConfigError."""
    if name not in POLICIES:
        raise ConfigError(f"the policy is {name!r}; use one of {', '.join(POLICIES)}")
    return POLICIES[name]()
