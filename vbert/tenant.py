"""`TenantModule`: everything one tenant adds to the backbone, as plain fp32 host tensors.

Readers (vbert/formats/) make it, the dense reference (vbert/reference.py) reads it, and vbert/checkpoint.py packs
it into the native file, whose data section is what an arena slot holds. Nothing here knows a batch or a device.

A delta is one of five kinds at one site of one layer (docs/architecture.md). At one linear the order is: input
scale; shared product and bias; + low rank + sparse; then scale and shift.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = [
    "BOTTLENECK_SITES",
    "HEAD_KINDS",
    "PATHS",
    "Affine",
    "Bottleneck",
    "Delta",
    "Dense",
    "Exit",
    "Head",
    "LowRank",
    "Norm",
    "OwnWeights",
    "SelfTest",
    "Sparse",
    "TenantModule",
]

HEAD_KINDS = ("classify", "token_classify", "embed", "rerank")
# Ways through the lower layers that a tenant may be trained for: all plain layers; local layers on whole n-grams;
# n-grams of which the rarer are replaced by shorter ones.
PATHS = ("plain", "exact", "backoff")

# in-tap and out-tap of a bottleneck around a sub-layer. `input`: what enters the sub-layer; `output`: what leaves
# it, before residual and LayerNorm; `normed`: LayerNorm(output + residual), read only; `after`: after the LayerNorm.
BOTTLENECK_SITES = tuple(
    f"{sub}.{taps}"
    for sub in ("attn", "ffn")
    for taps in ("output>output", "normed>output", "input>output", "after>after")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """y += (x A) B. The method's scale (alpha / r, ...) is already in `b`."""

    layer: int
    site: str  # one of LINEAR_SITES
    a: Tensor  # [H_in, R]
    b: Tensor  # [R, H_out]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """out += act(in D + d) U + e, `in` and `out` the taps of `site`. The scale is already in `up` and `up_bias`."""

    layer: int
    site: str  # one of BOTTLENECK_SITES
    activation: str
    down: Tensor  # [H, R]
    down_bias: Tensor  # [R]
    up: Tensor  # [R, H]
    up_bias: Tensor  # [H]


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """x = x * input_scale before a linear; y = y * scale + shift after it, y with the shared bias. None: not there."""

    layer: int
    site: str  # one of LINEAR_SITES; input_scale not at q, k, v
    input_scale: Tensor | None = None  # [H_in]
    scale: Tensor | None = None  # [H_out]
    shift: Tensor | None = None  # [H_out]


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A LayerNorm's weight and bias, replaced. Both always given (the shared one where only the other was tuned)."""

    layer: int  # EMBEDDING_LAYER with site emb_norm
    site: str  # one of NORM_SITES
    weight: Tensor  # [H]
    bias: Tensor  # [H]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """y += x S^T, S a sparse change of the weight [H_out, H_in] in compressed rows.

    Row o holds values[e] at the inputs columns[e], row_starts[o] <= e < row_starts[o + 1].
    """

    layer: int
    site: str  # one of LINEAR_SITES
    row_starts: Tensor  # [H_out + 1] int32
    columns: Tensor  # [nnz] int32
    values: Tensor  # [nnz] float32


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnWeights:
    """Weights in place of the shared ones. A tenant has them for every site, and then no other delta, or for none."""

    layer: int  # EMBEDDING_LAYER for tables and emb_norm
    site: str  # as `EncoderConfig.weight_shapes` has them
    weight: Tensor
    bias: Tensor | None = None


Delta = LowRank | Bottleneck | Affine | Norm | Sparse | OwnWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """One dense layer of a head: act(x W^T + b)."""

    weight: Tensor  # [out, in], as torch.nn.Linear has it
    bias: Tensor | None  # [out]
    activation: str = "identity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What turns hidden states into an answer.

    kind: `classify`, `token_classify`, `embed` or `rerank`.
    pooling: `cls`, `mean` (over all tokens of the sequence, special ones included) or `none` (one row a token).
    shared_pooler: rows go through the backbone's own pooler, tanh(dense(x)), before `layers`.
    layers: applied in order; an `embed` head may have none.
    problem (classify, rerank): `single_label` softmax, `multi_label` sigmoid, `regression` raw numbers.
        A rerank head has one output; its score is sigmoid(logit), or the raw number for `regression`. A two-label
        classifier that judges pairs may serve rerank too: its score is the probability of label 1.
    labels: one name a class, in order; LABEL_i where the checkpoint has none. Empty for `embed`.
    normalise (embed): L2-normalise the result.
    """

    kind: str
    pooling: str = "cls"
    shared_pooler: bool = False
    layers: tuple[Dense, ...] = ()
    problem: str = "single_label"
    labels: tuple[str, ...] = ()
    normalise: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """Another head of a classifier, for texts that need no more layers. layer: reads what enters this one.

    head: as the tenant's own, with layers of its own. An answer leaves here when its confidence is above the tenant's
    threshold: its probability, for multi_label that of the least sure label, of being there or of not being there.
    """

    layer: int
    head: Head


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """One input with the answer an independent implementation gave, fp32.

    token_ids, type_ids: as the tokenizer made them. expected: the head's output before softmax or sigmoid: logits
    [C], token logits [n, C], or the pooled, projected, normalised embedding [D]. path: the one that is tested; of
    `backoff`, token i keeps 3, 2 or 1 tokens of its n-gram as i mod 3 is 0, 1 or 2. exit: layer of the exit that is
    tested; 0: the head.
    """

    token_ids: Tensor  # [n] int64
    type_ids: Tensor  # [n] int64
    expected: Tensor  # [C], [n, C] or [D] float32
    path: str = "plain"
    exit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantModule:
    """One version of one tenant, independent of its name.

    backbone_fingerprint: of the backbone it was made for (`vbert.formats.fingerprint`); another one refuses it. Of its
        skip part where the tenant cannot go the plain way.
    paths: those of PATHS it was trained for. skip_fingerprint: of the skip part, where plain is not the only one.
    max_length: tokens, when the tenant takes less than the backbone does.
    exits: of a classifier, ascending layers. exit_threshold: confidence above which an answer leaves; 1: none does.
    source: where it came from, for people: {"format": "peft", "method": "LORA", ...}; JSON values only.
    """

    backbone_fingerprint: str
    deltas: tuple[Delta, ...]
    head: Head
    max_length: int | None = None
    self_tests: tuple[SelfTest, ...] = ()
    paths: tuple[str, ...] = ("plain",)
    skip_fingerprint: str = ""
    exits: tuple[Exit, ...] = ()
    exit_threshold: float = 1.0
    source: dict[str, Any] = field(default_factory=dict)
