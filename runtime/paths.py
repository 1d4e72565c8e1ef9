"""Which ways through the lower layers the inputs of a request may take, and which n-gram tables are asked first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtime.request import Served
from runtime.tenant_rules import TenantRules
from vbert.errors import BadRequest, ConfigError

__all__ = ["AUTO", "PathRules", "table_files"]

AUTO = "auto"
_ASKED = ("plain", "exact", "compute", "backoff")


class PathRules:
    """`--paths` and `--ngram-domains`."""

    def __init__(self, paths: Sequence[str], domains: Sequence[str], tables: Mapping[str, Sequence[str]]) -> None:
        """tables: by domain, "" for all. Raises ConfigError."""
        self._paths = TenantRules("paths", paths, (AUTO, *_ASKED))
        self._domains = TenantRules("ngram_domains", domains, [domain for domain in tables if domain])
        self._tables = tables
        if unused := [domain for domain in tables if domain and domain not in self._domains.values]:
            raise ConfigError(
                f"ngrams has tables of {unused[0]!r}, and no tenant is of that domain; say which are, as "
                f"ngram_domains 'acme.*={unused[0]}'",
                param="ngrams",
            )

    def allowed(self, served: Served, asked: str | None) -> tuple[str, ...]:
        """For `SequenceInput.paths`. asked: what the request says, if anything. Where the operator fixed the path of a
        tenant, nothing else is allowed. Raises BadRequest."""
        tenant, able = served.key.tenant, served.paths
        if "" not in self._tables and self.domain(tenant) not in self._tables:
            able = tuple(path for path in able if path != "backoff")  # each text would have the same answer
            if not able:
                raise BadRequest(
                    f"{tenant!r} was trained for backoff only, and no n-gram table is served to it; give --ngrams FILE",
                    param="model",
                )
        if "exact" in able:
            able = (*able, "compute")
        fixed = self._paths.value(tenant, AUTO)
        if fixed != AUTO and fixed not in able:
            raise BadRequest(
                f"the operator fixed the path {fixed} for {tenant!r}, which can take {', '.join(able)}; only the "
                "server's option --paths can mend that",
                param="path",
            )
        if fixed != AUTO and asked not in (None, AUTO, fixed):
            raise BadRequest(
                f"path is {asked!r}, and the operator fixed {fixed} for {tenant!r}; leave path out", param="path"
            )
        path = fixed if asked is None or asked == AUTO else asked
        if path == AUTO:
            return tuple(path for path in able if path != "compute")
        if path not in able:
            raise BadRequest(
                f"path is {asked!r}, {tenant!r} can take {', '.join(able)}; ask for one of these, or {AUTO}",
                param="path",
            )
        return (path,)

    def domain(self, tenant: str) -> str:
        return self._domains.value(tenant, "")


def table_files(option: Sequence[str]) -> dict[str, list[str]]:
    """`--ngrams` FILE or DOMAIN=FILE: files by domain, in the order given; "" is for all. Raises ConfigError."""
    files: dict[str, list[str]] = {}
    for item in option:
        domain, equals, file = item.partition("=")
        if not equals or "/" in domain:
            domain, file = "", item
        elif not domain or not file:
            raise ConfigError(f"ngrams has {item!r}; write FILE, or DOMAIN=FILE")
        files.setdefault(domain, []).append(file)
    return files
