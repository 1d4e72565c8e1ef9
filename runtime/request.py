"""Value objects of one request: what was asked, where it waits, what is answered. No behaviour beyond arithmetic.

All times are seconds of `runtime.clock.Clock.now_s`, all lengths tokens. An *input* is one text (or pair, or list of
words, or list of token ids); a request holds one or more inputs of one tenant version and is answered as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PRIORITIES",
    "Batch",
    "BatchPlan",
    "ClassifyResult",
    "EmbedResult",
    "Entity",
    "Input",
    "RerankResult",
    "Result",
    "ScoreResult",
    "Served",
    "Slice",
    "TenantKey",
    "Timings",
    "TokenClassifyResult",
    "Waiting",
    "Way",
]

PRIORITIES = ("interactive", "batch")

Input = str | tuple[str, str] | Sequence[str] | Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantKey:
    """The tenant version a request was admitted for. It never changes afterwards, whatever happens to the tenant.

    `digest` is the SHA-256 of the native file: residency is by digest, so two names with the same content share a slot.
    The backbone itself, asked by its own name, has version 0 and digest "".
    """

    tenant: str
    version: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What one tenant version serves, fixed at admission like its key.

    task: kind of its head. kinds: delta kinds of its module. max_length: tokens of one input, of the tenant if it has a
    limit of its own (`own_limit`), else of the backbone. paths: ways through the lower layers that it was trained for.
    exits: layers before which an answer may leave that is more confident than exit_threshold.
    """

    key: TenantKey
    task: str
    problem: str
    labels: tuple[str, ...]
    kinds: tuple[str, ...]
    max_length: int
    own_limit: bool
    paths: tuple[str, ...] = ("plain",)
    exits: tuple[int, ...] = ()
    exit_threshold: float = 1.0

    @property
    def methods(self) -> tuple[str, ...]:
        """What it can be asked for. A classifier with two labels, or one number, may also judge pairs."""
        if self.task == "rerank":
            return ("rerank", "score")
        one_score = (self.problem, len(self.labels)) in (("single_label", 2), ("regression", 1), ("regression", 0))
        return (self.task, "rerank", "score") if self.task == "classify" and one_score else (self.task,)


@dataclass(frozen=True, slots=True)
class Way:
    """How one input came through the layers. path: as `Result` has it; "": it did not. exit: the layer before which its
    answer left early; 0: it went through all of them."""

    path: str = ""
    exit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds a request spent: tokenising, waiting, waiting for its module to be loaded, in compute, and altogether."""

    tokenize_s: float
    queue_s: float
    load_s: float
    compute_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What every answer carries. `tokens`: per input, special tokens included. `truncated`: per input. `paths`: per
    input, how it came through the lower layers: plain, stored (its text was seen before), exact, compute or backoff."""

    tenant: str
    version: int
    timings: Timings
    tokens: tuple[int, ...]
    truncated: tuple[bool, ...]
    paths: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedResult(Result):
    embeddings: NDArray[np.float32]  # [N, D]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyResult(Result):
    """`labels`: per input the best label; for multi_label all labels with probability >= 0.5 (a tuple of strings);
    for regression an empty string. `probabilities`: softmax, sigmoid or, for regression, the raw numbers. `exits`: per
    input, the layer before which the answer left early; None: it went through all."""

    labels: tuple[str | tuple[str, ...], ...]
    probabilities: NDArray[np.float32]  # [N, C]
    class_labels: tuple[str, ...]  # [C]
    problem: str
    exits: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entity:
    """A labelled span. `start`, `end`: Unicode code points of the text, or word indices when words were given."""

    start: int
    end: int
    label: str
    score: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenClassifyResult(Result):
    entities: tuple[tuple[Entity, ...], ...]  # per input


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankResult(Result):
    """`scores`: per document, in the order given. `order`: document indices, best first, at most top_n."""

    scores: NDArray[np.float32]  # [N]
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResult(Result):
    scores: NDArray[np.float32]  # [N]


# ---- what the scheduler sees -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One admitted request as a policy sees it.

    `lengths`: tokens of each input still to run; `first`: index of the first of them in the request. `weight`: of its
    tenant's share, `priority`: one of PRIORITIES, `kind`: of the deltas of its module, as a profile names them.
    """

    request_id: int
    key: TenantKey
    caller: str
    arrival_s: float
    deadline_s: float | None
    lengths: tuple[int, ...]
    first: int = 0
    weight: float = 1.0
    priority: str = "interactive"
    kind: str = ""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class Slice:
    """Inputs first <= i < last of one request: a request may be split over batches."""

    request_id: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Batch:
    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What a policy decides. Batches in launch order; tenants to bring in next; requests past their deadline; when to
    ask again (None: on the next event); and digests of modules that make room for those to bring in."""

    batches: tuple[Batch, ...] = ()
    prefetch: tuple[TenantKey, ...] = ()
    expire: tuple[int, ...] = ()
    wake_s: float | None = None
    release: tuple[str, ...] = ()
