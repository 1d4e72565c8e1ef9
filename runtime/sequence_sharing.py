"""Whose requests may share the stored lower layers of a text: `--sequence-sharing 'acme.*=own,bank=off,*=shared'`.

A shared store tells one tenant, by how fast an answer comes, that another one sent the same text before. A tenant that
must not be told about has entries of its own, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from runtime.tenant_rules import TenantRules

__all__ = ["SequenceSharing"]


class SequenceSharing:
    """Without a rule that fits, a tenant shares."""

    def __init__(self, rules: Sequence[str]) -> None:
        """Raises ConfigError."""
        self._rules = TenantRules("sequence_sharing", rules, ("shared", "own", "off"))

    def scope(self, tenant: str, salt: Callable[[str], bytes]) -> bytes | None:
        """For `SequenceInput.scope`. salt: the scope of a tenant that shares with nobody."""
        mode = self._rules.value(tenant, "shared")
        if mode == "off":
            return None
        return salt(tenant) if mode == "own" else b""
