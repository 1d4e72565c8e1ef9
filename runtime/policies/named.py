"""Policies by name, for `vbert serve --policy` and `vbert simulate --policy`.

Those of INSTANCE_POLICIES are for tenants with whole weights of their own (runtime/policies/on_instances.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from runtime.cost import TYPICAL_LENGTH, CostModel
from runtime.policies.instances import INSTANCE_POLICIES, instance_policy
from runtime.policies.on_instances import OnInstances
from runtime.policies.orders import Arrival, EarliestDeadline, FairShares, ResponseRatio, ShortestFirst, UrgentFirst
from runtime.policies.pooled import Pooled, ProfileCosts
from runtime.policies.pools import POOL_POLICIES
from runtime.policies.token_budget import TokenBudget
from runtime.scheduler import BatchPolicy
from vbert.errors import ConfigError

__all__ = ["DEFAULT", "POLICIES", "POOLED", "Instances", "batch_policy", "check_policy"]

_ITEM_S = 0.008  # of an input, where no profile says better
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Instances:
    """What policies for instances are told. count: tenants in memory at a time. deadline_s: that requests are wanted
    within. load_s: of a tenant's weights."""

    count: int = 2
    deadline_s: float = 3.0
    load_s: float = 0.15


def batch_policy(
    name: str, cost: CostModel | None = None, *, max_batch_tokens: int = 4096, instances: Instances | None = None
) -> BatchPolicy:
    """cost: those of POOLED need it. Raises ConfigError."""
    if name in POLICIES:
        return POLICIES[name]()
    check_policy(name)
    if name in INSTANCE_POLICIES:
        given = instances or Instances()
        item_s = cost.forward_s(TYPICAL_LENGTH) if cost else _ITEM_S
        policy = instance_policy(name, deadline_s=given.deadline_s, item_s=item_s, load_s=given.load_s)
        return OnInstances(policy=policy, instances=given.count, load_s=given.load_s)
    if cost is None:
        raise ConfigError(f"the policy {name!r} needs a profile; give one of `vbert profile`, or use {DEFAULT!r}")
    return Pooled(policy=POOL_POLICIES[name.removeprefix("pool-")], costs=ProfileCosts(cost, max_batch_tokens))


def check_policy(name: str) -> None:
    """Raises ConfigError for a name that there is not."""
    every = (*POLICIES, *POOLED, *INSTANCE_POLICIES)
    if name not in every:
        raise ConfigError(f"the policy is {name!r}; use one of {', '.join(every)}")
