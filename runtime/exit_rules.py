"""How confident an answer must be to leave early: what the request says, else the operator, else the tenant's file."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.request import Served
from runtime.tenant_rules import TenantRules
from vbert.errors import BadRequest, ConfigError

__all__ = ["ExitRules"]


class ExitRules:
    """`--exit-thresholds`."""

    def __init__(self, rules: Sequence[str]) -> None:
        """Raises ConfigError."""
        self._rules = TenantRules("exit_thresholds", rules)
        for value in self._rules.values:
            if not _is_share(value):
                raise ConfigError(f"exit_thresholds has the confidence {value!r}; give a number from 0 to 1")

    def threshold(self, served: Served, asked: float | None) -> float:
        """For `SequenceInput.exit_above`. asked: what the request says, if anything. Raises BadRequest."""
        if asked is None:
            return float(self._rules.value(served.key.tenant, str(served.exit_threshold)))
        if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 <= asked <= 1:
            raise BadRequest(f"exit_threshold is {asked!r}; give a confidence from 0 to 1", param="exit_threshold")
        if not served.exits:
            raise BadRequest(
                f"{served.key.tenant!r} has no exits to leave by; leave exit_threshold out, or train it with --exits",
                param="exit_threshold",
            )
        if asked < 1 and float(self._rules.value(served.key.tenant, "0")) >= 1:
            raise BadRequest(
                f"the operator lets no answer of {served.key.tenant!r} leave early; leave exit_threshold out",
                param="exit_threshold",
            )
        return float(asked)


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False
