"""Whose requests may share the stored lower layers of a text: `--sequence-sharing 'acme.*=own,bank=off,*=shared'`.

A shared store tells one tenant, by how fast an answer comes, that another one sent the same text before. A tenant that
must not be told about has entries of its own, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from vbert.errors import ConfigError

__all__ = ["SequenceSharing"]

_MODES = ("shared", "own", "off")


class SequenceSharing:
    """Rules `pattern=mode` with shell patterns of tenant names; the first that fits holds, without any it is shared."""

    def __init__(self, rules: Sequence[str]) -> None:
        """Raises ConfigError."""
        self._rules: list[tuple[str, str]] = []
        for rule in rules:
            pattern, _, mode = rule.partition("=")
            if not pattern or mode not in _MODES:
                raise ConfigError(
                    f"sequence_sharing has the rule {rule!r}; write PATTERN=MODE, the mode being shared, own or off"
                )
            self._rules.append((pattern, mode))

    def scope(self, tenant: str, salt: Callable[[str], bytes]) -> bytes | None:
        """For `SequenceInput.scope`. salt: the scope of a tenant that shares with nobody."""
        mode = next((mode for pattern, mode in self._rules if fnmatchcase(tenant, pattern)), "shared")
        if mode == "off":
            return None
        return salt(tenant) if mode == "own" else b""
