"""The dense reference: what a tenant computes, written a second time, plainly.

One sequence at a time, fp32, deltas merged into dense weights, no segments, slots or packing. It shares no code with
the packed encoder, so that an error in either shows as a difference. Correct first, never fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vbert.config import EMBEDDING_LAYER, EncoderConfig
from vbert.errors import ShapeError
from vbert.formats.transformers_folder import Backbone
from vbert.skip import Skip
from vbert.tenant import Affine, Bottleneck, Delta, Head, LowRank, Norm, OwnWeights, Sparse, TenantModule

__all__ = ["dense_forward", "dense_hidden", "merge"]

Weights = dict[str, Tensor]
Ids = Tensor | Sequence[int]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


@torch.no_grad()
def dense_forward(
    backbone: Backbone,
    module: TenantModule | None,
    token_ids: Ids,
    type_ids: Ids,
    path: str = "plain",
    exit_layer: int = 0,
) -> Tensor:
    """The head's output for one sequence, before softmax or sigmoid; of the backbone's embed head without a module.

    Args: token_ids, type_ids: [n]. path: as in vbert.tenant.SelfTest. exit_layer: of an exit, 0: the tenant's head.
    Returns: fp32 [C]; [n, C] where the head pools nothing; [D] for an embedding, normalised if the head says so.
    Raises: ShapeError when the sequence is longer than the backbone or the ids and types differ in length.
    """
    hidden = dense_hidden(backbone, module, token_ids, type_ids, path, exit_layer or backbone.config.num_layers)
    if module is None:
        return _head(backbone.embed_head, hidden, backbone.weights)
    heads = {0: module.head} | {each.layer: each.head for each in module.exits}
    return _head(heads[exit_layer], hidden, backbone.weights)


@torch.no_grad()
def dense_hidden(
    backbone: Backbone,
    module: TenantModule | None,
    token_ids: Ids,
    type_ids: Ids,
    path: str = "plain",
    layer: int | None = None,
) -> Tensor:
    """Hidden states [n, H] fp32 of one sequence of n tokens that enter a layer; None: the last ones."""
    config = backbone.config
    ids, types = torch.as_tensor(token_ids).long(), torch.as_tensor(type_ids).long()
    if ids.dim() != 1 or ids.shape != types.shape or not 0 < len(ids) <= config.max_length:
        raise ShapeError(f"ids {tuple(ids.shape)}, types {tuple(types.shape)}: give [n], n in 1..{config.max_length}")
    deltas = () if module is None else module.deltas
    weights = merge(backbone.weights, deltas)
    first = 0
    if path == "plain":
        hidden = _embed(config, weights, ids, types)
    else:
        if backbone.skip is None:
            raise ShapeError(f"the backbone has no skip part, and so no path {path!r}")
        first = backbone.skip.config.first_layer
        hidden = _skipped(backbone, backbone.skip, ids, types, path)
    bias = _relative_bias(config, weights, len(ids))
    for i in range(first, config.num_layers if layer is None else layer):
        adapters = [delta for delta in deltas if isinstance(delta, Bottleneck) and delta.layer == i]
        hidden = _layer(config, _layer_weights(weights, i), adapters, hidden, bias)
    return hidden


def merge(weights: Weights, deltas: Iterable[Delta]) -> Weights:
    """Dense weights of the tenant: every delta but bottlenecks folded in. The given tensors are not changed.

    At one linear: W' = diag(scale) (W + (A B)^T + S^T) diag(input_scale), b' = scale * b + shift.
    """
    merged = dict(weights)
    # Scales act on the sum of the others, whatever the order of the deltas.
    for delta in sorted(deltas, key=lambda delta: isinstance(delta, Affine)):
        if isinstance(delta, Bottleneck):
            continue
        if isinstance(delta, OwnWeights):
            merged |= _replaced(delta)
            continue
        name = "emb_norm" if delta.layer == EMBEDDING_LAYER else f"layers.{delta.layer}.{delta.site}"
        weight, bias = merged[f"{name}.weight"], merged[f"{name}.bias"]
        if isinstance(delta, LowRank):
            weight = weight + (delta.a.float() @ delta.b.float()).T
        elif isinstance(delta, Sparse):
            weight = weight + _dense(delta, weight.shape[1])
        elif isinstance(delta, Norm):
            weight, bias = delta.weight.float(), delta.bias.float()
        else:
            weight, bias = _scaled(delta, weight, bias)
        merged[f"{name}.weight"], merged[f"{name}.bias"] = weight, bias
    return merged


def _replaced(delta: OwnWeights) -> dict[str, Tensor]:
    """By our names."""
    weight, bias = delta.weight.float(), _float(delta.bias)
    if delta.layer == EMBEDDING_LAYER:
        return {delta.site: weight} if bias is None else {f"{delta.site}.weight": weight, f"{delta.site}.bias": bias}
    assert bias is not None
    sites = ("q", "k", "v") if delta.site == "qkv" else (delta.site,)
    parts = zip(sites, weight.chunk(len(sites)), bias.chunk(len(sites)), strict=True)
    return {f"layers.{delta.layer}.{s}.{p}": t for s, w, b in parts for p, t in (("weight", w), ("bias", b))}


def _dense(delta: Sparse, width: int) -> Tensor:
    """[H_out, H_in] of compressed rows."""
    counts = delta.row_starts.long().diff()
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    dense = torch.zeros(len(counts), width)
    return dense.index_put_((rows, delta.columns.long()), delta.values.float(), accumulate=True)


def _scaled(delta: Affine, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    if delta.input_scale is not None:
        weight = weight * delta.input_scale.float()
    if delta.scale is not None:
        weight, bias = weight * delta.scale.float()[:, None], bias * delta.scale.float()
    if delta.shift is not None:
        bias = bias + delta.shift.float()
    return weight, bias


def _layer_weights(weights: Weights, layer: int) -> Weights:
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _embed(config: EncoderConfig, weights: Weights, ids: Tensor, types: Tensor) -> Tensor:
    positions = torch.arange(len(ids))
    if config.position_offset:
        # RoBERTa and MPNet count only what is not padding; a pad token inside a text keeps the padding position.
        padding = config.position_offset - 1
        real = (ids != padding).long()
        positions = real.cumsum(0) * real + padding
    rows = weights["word_embeddings"][ids] + weights["position_embeddings"][positions]
    if "type_embeddings" in weights:
        rows = rows + weights["type_embeddings"][types]
    return _norm(config, weights, "emb_norm", rows)


def _norm(config: EncoderConfig, weights: Weights, name: str, rows: Tensor) -> Tensor:
    return F.layer_norm(
        rows, rows.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_eps
    )


def _linear(weights: Weights, name: str, rows: Tensor) -> Tensor:
    return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _layer(
    config: EncoderConfig, weights: Weights, adapters: list[Bottleneck], hidden: Tensor, bias: Tensor | float
) -> Tensor:
    attended = _linear(weights, "attn_out", _attention(config, weights, hidden, bias))
    hidden = _sub_layer(config, weights, adapters, "attn", hidden, attended)
    wide = _ACTIVATIONS[config.activation](_linear(weights, "ffn_up", hidden))
    return _sub_layer(config, weights, adapters, "ffn", hidden, _linear(weights, "ffn_down", wide))


def _attention(config: EncoderConfig, weights: Weights, hidden: Tensor, bias: Tensor | float) -> Tensor:
    """[n, H] -> [n, H], before the output projection. bias: [A, n, n], added to the scores."""
    q, k, v = (
        _linear(weights, site, hidden).view(-1, config.num_heads, config.head_size).transpose(0, 1)
        for site in ("q", "k", "v")
    )
    scores = q @ k.transpose(1, 2) / math.sqrt(config.head_size) + bias  # [A, n, n]
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(hidden.shape)


def _sub_layer(
    config: EncoderConfig, weights: Weights, adapters: list[Bottleneck], sub: str, residual: Tensor, output: Tensor
) -> Tensor:
    """Residual and LayerNorm of a sub-layer. Each bottleneck reads its tap as it is without the other ones."""
    taps = {"input": residual, "output": output, "normed": _norm(config, weights, f"{sub}_norm", output + residual)}
    for adapter in adapters:
        where, tap = adapter.site.split(".")
        if where == sub and tap.endswith(">output"):
            output = output + _bottleneck(adapter, taps[tap.split(">")[0]])
    after = _norm(config, weights, f"{sub}_norm", output + residual)
    extra = [_bottleneck(adapter, after) for adapter in adapters if adapter.site == f"{sub}.after>after"]
    return after + sum(extra, torch.zeros(()))


def _bottleneck(adapter: Bottleneck, rows: Tensor) -> Tensor:
    inner = _ACTIVATIONS[adapter.activation](rows @ adapter.down.float() + adapter.down_bias.float())
    return inner @ adapter.up.float() + adapter.up_bias.float()


def _skipped(backbone: Backbone, skip: Skip, ids: Tensor, types: Tensor, path: str) -> Tensor:
    """What enters the upper layers, [n, H]: each n-gram by itself, of the slots that are there only."""
    config, weights, n = backbone.config, skip.weights, len(ids)
    merged = torch.zeros(n, config.hidden_size)
    for i in range(n):
        kept = 3 - i % 3 if path == "backoff" else 3
        slots = [s for s in range(3) if 0 <= i + s - 1 < n and (s == 1 or skip.config.window == 3)]
        slots = [s for s in slots if s == 1 or kept == 3 or (kept == 2 and s == 2)]
        rows = backbone.weights["word_embeddings"][ids[[i + s - 1 for s in slots]]]
        rows = _norm(config, weights, "emb_norm", rows + weights["position_embeddings"][slots])
        for layer in range(skip.config.local_layers):
            rows = _local_layer(config, _layer_weights(weights, layer), rows)
        for s, row in zip(slots, rows, strict=True):
            gate = torch.sigmoid(row @ weights["gate.weight"][s] + weights["gate.bias"][s])
            merged[i + s - 1] += gate * row
    merged = merged + weights["merge.position_embeddings"][:n]
    merged = merged + weights["merge.type_embeddings"][types.clamp(max=skip.config.type_vocab_size - 1)]
    return _norm(config, weights, "merge.norm", merged)


def _local_layer(config: EncoderConfig, weights: Weights, rows: Tensor) -> Tensor:
    """An ordinary layer, but that its rows see the sinks as well."""
    q, k, v = (_linear(weights, site, rows) for site in ("q", "k", "v"))
    k, v = torch.cat([weights["sink_keys"], k]), torch.cat([weights["sink_values"], v])
    q, k, v = (x.view(len(x), config.num_heads, config.head_size).transpose(0, 1) for x in (q, k, v))
    scores = (q @ k.transpose(1, 2) / math.sqrt(config.head_size)).softmax(-1)
    attended = _linear(weights, "attn_out", (scores @ v).transpose(0, 1).reshape(rows.shape))
    hidden = _norm(config, weights, "attn_norm", rows + attended)
    wide = _ACTIVATIONS[config.activation](_linear(weights, "ffn_up", hidden))
    return _norm(config, weights, "ffn_norm", hidden + _linear(weights, "ffn_down", wide))


def _relative_bias(config: EncoderConfig, weights: Weights, length: int) -> Tensor | float:
    """MPNet's bias on attention scores, [A, n, n]: half of the buckets for each direction, the nearer half of those
    exact, the rest logarithmic up to a distance of 128 (Raffel et al. 2020, arXiv:1910.10683)."""
    if not config.relative_buckets:
        return 0.0
    half, exact = config.relative_buckets // 2, config.relative_buckets // 4
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]  # key - query
    far = distance.abs().clamp(min=1).float()
    spread = exact + (torch.log(far / exact) / math.log(128 / exact) * (half - exact)).long()
    bucket = torch.where(distance.abs() < exact, distance.abs(), spread.clamp(max=half - 1))
    return weights["relative_attention_bias"][bucket + half * (distance > 0)].permute(2, 0, 1)


def _head(head: Head, hidden: Tensor, weights: Weights) -> Tensor:
    rows = {"cls": hidden[0], "mean": hidden.mean(0), "none": hidden}[head.pooling]
    if head.shared_pooler:
        rows = torch.tanh(_linear(weights, "pooler", rows))
    for layer in head.layers:
        rows = _ACTIVATIONS[layer.activation](F.linear(rows, layer.weight.float(), _float(layer.bias)))
    return F.normalize(rows, dim=-1) if head.kind == "embed" and head.normalise else rows


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
