"""How large a tenant's share is beside the others: what the operator says, else 1."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.tenant_rules import TenantRules
from vbert.errors import ConfigError

__all__ = ["WeightRules"]


class WeightRules:
    """`--tenant-weights`."""

    def __init__(self, rules: Sequence[str]) -> None:
        """Raises ConfigError."""
        self._rules = TenantRules("tenant_weights", rules)
        for value in self._rules.values:
            if not _is_weight(value):
                raise ConfigError(f"tenant_weights has the weight {value!r}; give a number from 0.001 to 1000")

    def weight(self, tenant: str) -> float:
        return float(self._rules.value(tenant, "1"))


def _is_weight(text: str) -> bool:
    try:
        return 0.001 <= float(text) <= 1000
    except ValueError:
        return False
