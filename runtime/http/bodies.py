"""Request bodies and queries, strictly typed. A field's description is both its entry in /openapi.json and its error.

Counts, lengths in tokens and the words of a tenant are the engine's to check: they hold for in-process callers too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from runtime.http.errors import InvalidValue, MalformedBody

__all__ = [
    "ActivateBody",
    "ClassifyBody",
    "EmbeddingsBody",
    "InferBody",
    "PageQuery",
    "RerankBody",
    "ScoreBody",
    "TokenClassifyBody",
    "parse_json",
    "parse_query",
]

T = TypeVar("T")


def _let_others_run(item: T) -> T:
    """Python between two items, where another thread may take the interpreter from a thread that reads a large body."""
    return item


_Pause = AfterValidator(_let_others_run)
Text = Annotated[str, Field(pattern=r"\S"), _Pause]
Word = Annotated[str, Field(min_length=1)]
Pair = tuple[Text, Text]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True), _Pause]
# fail_fast: the first bad item ends the check, so that a list of a million bad ones is not a million errors.
# left_to_right: the members of the unions exclude each other.
EmbeddingInput = Annotated[
    Text
    | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)],
    Field(union_mode="left_to_right"),
]
ClassifyItem = Annotated[Text | Pair, Field(union_mode="left_to_right")]
ClassifyInput = Annotated[
    Text | Annotated[list[ClassifyItem], Field(min_length=1, fail_fast=True)], Field(union_mode="left_to_right")
]
WordsItem = Annotated[
    Text | Annotated[list[Word], Field(min_length=1, fail_fast=True), _Pause], Field(union_mode="left_to_right")
]
WordsInput = Annotated[
    Text | Annotated[list[WordsItem], Field(min_length=1, fail_fast=True)], Field(union_mode="left_to_right")
]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class InferBody(Body):
    model: str = Field(min_length=1, max_length=256, description="the name of a tenant, or of the backbone")
    truncate: bool = Field(False, description="true to cut inputs that are too long, false to refuse them")
    timeout_ms: int | None = Field(
        None, ge=1, le=3_600_000, description="the milliseconds the answer may take, 1 to 3600000; null: the server's"
    )
    priority: Literal["interactive", "batch"] = Field(
        "interactive", description="interactive, or batch for what may wait while others are interactive"
    )
    path: Literal["auto", "plain", "exact", "compute", "backoff"] | None = Field(
        None,
        description="plain, exact, compute or backoff, if the tenant was trained for it, or auto; null: as auto",
    )

    @property
    def deadline_s(self) -> float | None:
        return None if self.timeout_ms is None else self.timeout_ms / 1000


class EmbeddingsBody(InferBody):
    """As OpenAI's, and `truncate`, `timeout_ms`, `priority`, `path`."""

    input: EmbeddingInput = Field(
        description="a text, a list of texts, a list of token ids, or a list of lists of token ids; none of them empty"
    )
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="float, or base64 for little-endian float32 bytes"
    )
    dimensions: int | None = Field(None, ge=1, le=2**31 - 1, description="the embedding's own width, or left out")
    user: str | None = Field(None, max_length=1024, description="a string of at most 1024 characters; it has no effect")


class ClassifyBody(InferBody):
    exit_threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="the confidence, 0 to 1, above which an answer may leave by an early exit; null: the tenant's",
    )
    input: ClassifyInput = Field(
        description="a text, or a list of texts and pairs of texts; an item that is a list of two texts is a pair"
        "; none of them empty"
    )


class TokenClassifyBody(InferBody):
    input: WordsInput = Field(
        description="a text, or a list of texts and lists of words; an item that is a list is one text in words"
        "; none of them empty"
    )


class RerankBody(InferBody):
    query: Text = Field(description="a text that is not empty")
    documents: list[Text] = Field(min_length=1, fail_fast=True, description="a list of texts, none of them empty")
    top_n: int | None = Field(None, ge=1, le=2**31 - 1, description="how many of the best to return, at least 1")


class ScoreBody(InferBody):
    input: list[Pair] = Field(
        min_length=1, fail_fast=True, description="a list of pairs of texts, none of them empty: [[a, b], ...]"
    )


class ActivateBody(Body):
    version: int = Field(ge=1, le=2**31 - 1, description="the number of a stored version, at least 1")


class PageQuery(BaseModel):
    """A page of a listing in the order of ids. Without a limit: everything."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    after: str = Field("", max_length=256, description="the last id of the page before, at most 256 characters")
    limit: int | None = Field(None, ge=1, le=10_000, description="how many to return, 1 to 10000")


Model = TypeVar("Model", bound=BaseModel)


def parse_json(model: type[Model], data: bytes) -> Model:
    """Raises MalformedBody (not JSON, not UTF-8), InvalidValue (JSON that the model does not allow)."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(model, error) from None


def parse_query(model: type[Model], query: dict[str, str]) -> Model:
    """Raises InvalidValue."""
    try:
        return model.model_validate(query)
    except ValidationError as error:
        raise _refusal(model, error) from None


def _refusal(model: type[BaseModel], error: ValidationError) -> InvalidValue | MalformedBody:
    """One sentence about the first field that is wrong. Of a union's many complaints the one counts that was reached
    last, as that of the member that fits best."""
    errors = error.errors(include_url=False)
    first = errors[0]
    if first["type"] == "json_invalid":
        return MalformedBody(f"the body is not JSON in UTF-8: {first['ctx']['error']}; send one JSON object")
    if not first["loc"]:
        return InvalidValue(f"the body is {_short(first['input'])}; send a JSON object")
    name = str(first["loc"][0])
    field = model.model_fields.get(name)
    if field is None:
        known = ", ".join(model.model_fields)
        return InvalidValue(f"{name[:80]} is not known here; the fields are {known}", param=name[:80])
    if (first["type"], len(first["loc"])) == ("missing", 1):
        return InvalidValue(f"{name} is missing; it must be {field.description}", param=name)
    last = max((one for one in errors if one["loc"][:1] == first["loc"][:1]), key=_place)
    place = "".join(f"[{i}]" for i in _place(last))
    value = _short(last["input"])
    return InvalidValue(f"{name}{place} is {value}; {name if place else 'it'} must be {field.description}", param=name)


def _place(error: ErrorDetails) -> list[int]:
    """The indices that lead from a field to the wrong value; where one is missing, to what it is missing from."""
    indices = [part for part in error["loc"][1:] if isinstance(part, int)]
    return indices[:-1] if error["type"] == "missing" else indices


def _short(value: Any) -> str:
    """An offending value in a few characters, never a list of a million items."""
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'JSON object'} of {len(value)}"
    return repr(value[:80] if isinstance(value, str | bytes) else value)[:100]
