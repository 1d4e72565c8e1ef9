"""The shapes of all answers, for /openapi.json and the tests. Handlers write plain dicts, which is faster."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "ClassifyAnswer",
    "DeletedAnswer",
    "EmbeddingsAnswer",
    "ErrorAnswer",
    "LiveAnswer",
    "ModelAnswer",
    "ModelsAnswer",
    "OpenApiAnswer",
    "ReadyAnswer",
    "RerankAnswer",
    "ScoreAnswer",
    "TenantAnswer",
    "TenantsAnswer",
    "TokenClassifyAnswer",
    "VersionsAnswer",
]


class Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Error(Shape):
    message: str
    type: str = Field(description="follows from the status")
    param: str | None = Field(description="the field of the request that is wrong")
    code: str = Field(description="stable; what a client should match on")
    retry_after_ms: int | None = Field(None, description="when asking again may help; Retry-After in whole seconds")


class ErrorAnswer(Shape):
    error: Error


class Usage(Shape):
    prompt_tokens: int
    total_tokens: int


class Timings(Shape):
    """Milliseconds. `load` is the wait for a tenant's module, `queue` all other waiting."""

    tokenize: float
    queue: float
    load: float
    compute: float
    total: float


class InferAnswer(Shape):
    """`truncated`: for each input (or document), whether it was cut to the limit. `paths`: how each came through the
    lower layers: plain, stored (its text was seen before), exact, compute or backoff."""

    object: Literal["list"]
    model: str
    version: int = Field(description="of the tenant; 0 for the backbone")
    usage: Usage
    timings: Timings
    truncated: list[bool]
    paths: list[str]


class Embedding(Shape):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsAnswer(InferAnswer):
    data: list[Embedding]


class Classification(Shape):
    """`label`: the best one; for multi_label all with a probability of at least 0.5; for regression null."""

    index: int
    label: str | list[str] | None
    probabilities: list[float] = Field(description="one a label, in the order of `labels`; for regression raw numbers")
    num_classes: int


class ClassifyAnswer(InferAnswer):
    """`exits`: for each input, the layer before which its answer left early; null: it went through all layers."""

    data: list[Classification]
    labels: list[str]
    problem: str
    exits: list[int | None]


class Entity(Shape):
    """`start`, `end`: Unicode code points of the text, or word indices where words were given."""

    start: int
    end: int
    label: str
    score: float
    text: str


class Entities(Shape):
    index: int
    entities: list[Entity]


class TokenClassifyAnswer(InferAnswer):
    data: list[Entities]


class Relevance(Shape):
    index: int
    relevance_score: float


class RerankAnswer(InferAnswer):
    results: list[Relevance] = Field(description="best first")


class Score(Shape):
    object: Literal["score"]
    index: int
    score: float


class ScoreAnswer(InferAnswer):
    data: list[Score]


class ModelAnswer(Shape):
    """`parent`: the backbone's name; null for the backbone itself."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None


class ModelsAnswer(Shape):
    object: Literal["list"]
    data: list[ModelAnswer]
    has_more: bool


class TenantAnswer(Shape):
    """One version of a tenant: the active one, but in a list of versions."""

    object: Literal["tenant"]
    id: str
    version: int
    active: bool
    created: int
    digest: str
    num_bytes: int
    fingerprint: str = Field(description="of the backbone it was made for")
    task: str
    problem: str
    labels: list[str]
    max_length: int | None
    kinds: list[str]
    paths: list[str] = Field(description="ways through the lower layers that it was trained and self-tested for")
    skip_fingerprint: str = Field(description="of the local layers it was trained on; empty: none")
    exits: list[int] = Field(description="layers before which its answers may leave")
    exit_threshold: float = Field(description="how confident an answer must be to leave; 1: none does")
    source: dict[str, Any]


class TenantsAnswer(Shape):
    object: Literal["list"]
    data: list[TenantAnswer]
    has_more: bool


class VersionsAnswer(Shape):
    object: Literal["list"]
    data: list[TenantAnswer]


class DeletedAnswer(Shape):
    object: Literal["tenant.deleted"]
    id: str
    deleted: Literal[True]


class PrefetchAnswer(Shape):
    object: Literal["tenant.prefetch"]
    id: str
    resident: bool


class LiveAnswer(Shape):
    status: Literal["live"]


class ReadyAnswer(Shape):
    """`canary`: the last request the server sent through its own queue. `watchdog`: whether work goes on."""

    status: Literal["ready", "not_ready"]
    reasons: list[str]
    canary: dict[str, Any]
    watchdog: dict[str, Any]
    error: Error | None = None


class OpenApiAnswer(BaseModel):
    """An OpenAPI 3.1 document."""

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
