"""Options that differ from tenant to tenant: `--sequence-sharing 'acme.*=own,bank=off'`, `--paths 'acme.*=exact'`."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from vbert.errors import ConfigError

__all__ = ["TenantRules"]


class TenantRules:
    """Rules PATTERN=VALUE with shell patterns of tenant names; the first that fits holds."""

    def __init__(self, option: str, rules: Sequence[str], values: Sequence[str] | None = None) -> None:
        """option: what errors call them. values: those that are known; None: any. Raises ConfigError for a rule that is
        none, or a value that is not known."""
        self._rules: list[tuple[str, str]] = []
        for rule in rules:
            pattern, _, value = rule.partition("=")
            if not pattern or (value not in values if values is not None else not value):
                known = "" if values is None else ", the value being "
                known += ", ".join(values or ()) or ("" if values is None else "none that is known; name some first")
                raise ConfigError(f"{option} has the rule {rule!r}; write PATTERN=VALUE{known}")
            self._rules.append((pattern, value))

    @property
    def values(self) -> list[str]:
        return [value for _, value in self._rules]

    def value(self, tenant: str, default: str) -> str:
        return next((value for pattern, value in self._rules if fnmatchcase(tenant, pattern)), default)
