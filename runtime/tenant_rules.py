"""Options that differ from tenant to tenant: `--sequence-sharing 'acme.*=own,bank=off'`, `--paths 'acme.*=exact'`."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from vbert.errors import ConfigError

__all__ = ["TenantRules"]


class TenantRules:
    """Rules PATTERN=VALUE with shell patterns of tenant names; the first that fits holds."""

    def __init__(self, option: str, rules: Sequence[str], values: Sequence[str]) -> None:
        """option: what errors call them. Raises ConfigError for a rule that is none, or a value that is not known."""
        self._rules: list[tuple[str, str]] = []
        for rule in rules:
            pattern, _, value = rule.partition("=")
            if not pattern or value not in values:
                known = ", ".join(values) or "none that is known; name some first"
                raise ConfigError(f"{option} has the rule {rule!r}; write PATTERN=VALUE, the value being {known}")
            self._rules.append((pattern, value))

    def value(self, tenant: str, default: str) -> str:
        return next((value for pattern, value in self._rules if fnmatchcase(tenant, pattern)), default)
