"""Which ways through the lower layers the inputs of a request may take, and which n-gram tables are asked first."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.request import Served
from runtime.tenant_rules import TenantRules
from vbert.errors import BadRequest, ConfigError

__all__ = ["AUTO", "PathRules", "table_files"]

AUTO = "auto"
_ASKED = ("plain", "exact", "compute", "backoff")


class PathRules:
    """`--paths` and `--ngram-domains`."""

    def __init__(self, paths: Sequence[str], domains: Sequence[str], known: Sequence[str]) -> None:
        """known: domains that have tables. Raises ConfigError."""
        self._paths = TenantRules("paths", paths, (AUTO, *_ASKED))
        self._domains = TenantRules("ngram_domains", domains, known)

    def allowed(self, served: Served, asked: str | None) -> tuple[str, ...]:
        """For `SequenceInput.paths`. asked: what the request says, None where it says nothing; then the rule of its
        tenant holds, and where that is a path the tenant was not trained for, all of its paths. Raises BadRequest."""
        trained = served.paths
        able = (*trained, "compute") if "exact" in trained else trained
        if asked is None:
            path = self._paths.value(served.key.tenant, AUTO)
            return (path,) if path in able else trained
        if asked == AUTO:
            return trained
        if asked not in able:
            raise BadRequest(
                f"path is {asked!r}, {served.key.tenant!r} can take {', '.join(able)}; ask for one of these, or {AUTO}",
                param="path",
            )
        return (asked,)

    def domain(self, tenant: str) -> str:
        return self._domains.value(tenant, "")


def table_files(option: Sequence[str]) -> dict[str, list[str]]:
    """`--ngrams` FILE or DOMAIN=FILE: files by domain, in the order given; "" is for all. Raises ConfigError."""
    files: dict[str, list[str]] = {}
    for item in option:
        domain, equals, file = item.rpartition("=")
        if not file or (equals and not domain):
            raise ConfigError(f"ngrams has {item!r}; write FILE, or DOMAIN=FILE")
        files.setdefault(domain, []).append(file)
    return files
