"""What a tenant store keeps of each version beside its file: value objects, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing it loads torch, which a listing does not need
    from vbert.header import TenantHeader

__all__ = ["ModuleFacts", "TenantVersion", "Upload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleFacts:
    """What the catalogue repeats of a native file's header, so that listing and resolving open no file.

    task: kind of the head. kinds: delta kinds (low_rank, bottleneck, affine, norm, sparse). paths, skip_fingerprint,
    exit_threshold: as in vbert.tenant.TenantModule. exits: their layers. source: JSON values.
    """

    fingerprint: str
    task: str
    problem: str = "single_label"
    labels: tuple[str, ...] = ()
    max_length: int | None = None
    kinds: tuple[str, ...] = ()
    paths: tuple[str, ...] = ("plain",)
    skip_fingerprint: str = ""
    exits: tuple[int, ...] = ()
    exit_threshold: float = 1.0
    source: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, header: TenantHeader) -> ModuleFacts:
        return cls(
            fingerprint=header.fingerprint,
            task=header.task,
            problem=header.head.problem,
            labels=header.head.labels,
            max_length=header.max_length,
            kinds=header.kinds,
            paths=header.paths,
            skip_fingerprint=header.skip_fingerprint,
            exits=tuple(each.layer for each in header.exits),
            exit_threshold=header.exit_threshold,
            source=dict(header.source),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantVersion(ModuleFacts):
    """One version of one tenant. `version`: 1, 2, ...; `created_s`: Unix time; `digest`: SHA-256 of the native file."""

    tenant: str
    version: int
    digest: str
    num_bytes: int
    created_s: float
    active: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """One version to be stored. `if_match`: the version that must be active now, 0 for none. `digest`: "": unknown."""

    tenant: str
    data: bytes
    facts: ModuleFacts
    activate: bool = True
    if_match: int | None = None
    digest: str = ""
