"""The frozen shared encoder: embeddings, attention, feed-forward, and one step `layer(i, ...)` of a packed batch.

Weights of BERT, RoBERTa, XLM-R, DistilBERT and MPNet come under one set of names (vbert/formats/names.py), so there is
one code path. It knows nothing of tenants but the `BatchDeltas` it asks at each site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vbert.activations import activate
from vbert.batch import AttentionBucket, AttentionPlan, PackedRows
from vbert.config import EMBEDDING_LAYER, EncoderConfig
from vbert.deltas import BatchDeltas

__all__ = ["Encoder"]


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor  # [out, in]
    bias: Tensor  # [out]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: Tensor  # [H]
    bias: Tensor  # [H]


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: _Linear  # [3 H, H]: query, key, value rows
    attn_out: _Linear
    attn_norm: _Norm
    ffn_up: _Linear
    ffn_down: _Linear
    ffn_norm: _Norm


class Encoder:
    """A frozen encoder in one dtype on one device. Source: Devlin et al. 2019, arXiv:1810.04805; MPNet's relative
    position bias: Song et al. 2020, arXiv:2004.09297."""

    def __init__(
        self, config: EncoderConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        """weights: the canonical float32 tensors of vbert/formats/transformers_folder.py."""
        self.config, self.dtype = config, dtype

        def get(name: str) -> Tensor:
            return weights[name].to(device=device, dtype=dtype)

        def linear(prefix: str) -> _Linear:
            return _Linear(get(f"{prefix}.weight"), get(f"{prefix}.bias"))

        def norm(prefix: str) -> _Norm:
            return _Norm(get(f"{prefix}.weight"), get(f"{prefix}.bias"))

        def qkv(prefix: str) -> _Linear:
            parts = [linear(f"{prefix}.{site}") for site in ("q", "k", "v")]
            return _Linear(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))

        self._word, self._position = get("word_embeddings"), get("position_embeddings")
        self._type = get("type_embeddings") if config.type_vocab_size else None
        self._emb_norm = norm("emb_norm")
        self._layers = tuple(
            _Layer(
                qkv(p),
                linear(f"{p}.attn_out"),
                norm(f"{p}.attn_norm"),
                linear(f"{p}.ffn_up"),
                linear(f"{p}.ffn_down"),
                norm(f"{p}.ffn_norm"),
            )
            for p in (f"layers.{i}" for i in range(config.num_layers))
        )
        self._relative = get("relative_attention_bias") if config.relative_buckets else None
        self._relative_by_length: dict[int, Tensor] = {}

    def embed(self, rows: PackedRows, deltas: BatchDeltas) -> Tensor:
        """Token rows to the hidden states that enter layer 0, [T, H]."""
        hidden = F.embedding(rows.token_ids, self._word)
        if self._type is not None:
            hidden = hidden.add_(F.embedding(rows.type_ids, self._type))
        hidden = hidden.add_(F.embedding(rows.position_ids, self._position))
        return self._normed(hidden, self._emb_norm, EMBEDDING_LAYER, "emb_norm", deltas)

    def layer(self, i: int, hidden: Tensor, rows: PackedRows, deltas: BatchDeltas) -> Tensor:
        """One transformer layer with every tenant's deltas, [T, H] -> [T, H]. `hidden` may be overwritten."""
        layer = self._layers[i]
        qkv = layer.qkv(hidden)
        sites = dict(zip(("q", "k", "v"), qkv.chunk(3, dim=1), strict=True))
        deltas.after_linear(i, hidden, sites)
        context = deltas.before_linear(i, "attn_out", self._attention(qkv, rows.attention), in_place=True)
        out = layer.attn_out(context)
        deltas.after_linear(i, context, {"attn_out": out})
        hidden = self._close(i, "attn", hidden, out, layer.attn_norm, deltas)

        x = deltas.before_linear(i, "ffn_up", hidden)
        wide = layer.ffn_up(x)
        deltas.after_linear(i, x, {"ffn_up": wide})
        wide = deltas.before_linear(i, "ffn_down", activate(wide, self.config.activation), in_place=True)
        out = layer.ffn_down(wide)
        deltas.after_linear(i, wide, {"ffn_down": out})
        return self._close(i, "ffn", hidden, out, layer.ffn_norm, deltas)

    def _close(self, i: int, sub: str, entered: Tensor, out: Tensor, norm: _Norm, deltas: BatchDeltas) -> Tensor:
        """Bottlenecks around a sub-layer, the residual and the LayerNorm. `out` is overwritten."""
        deltas.bottleneck(i, f"{sub}.input>output", entered, out)
        deltas.bottleneck(i, f"{sub}.output>output", out, out)
        if deltas.has_bottleneck(i, f"{sub}.normed>output"):
            normed = self._normed(out + entered, norm, i, f"{sub}_norm", deltas)
            deltas.bottleneck(i, f"{sub}.normed>output", normed, out)
        hidden = self._normed(out.add_(entered), norm, i, f"{sub}_norm", deltas)
        deltas.bottleneck(i, f"{sub}.after>after", hidden, hidden)
        return hidden

    def _normed(self, rows: Tensor, norm: _Norm, layer: int, site: str, deltas: BatchDeltas) -> Tensor:
        eps = self.config.layer_norm_eps
        out = F.layer_norm(rows, (rows.shape[1],), norm.weight, norm.bias, eps)
        deltas.norm(layer, site, rows, out, eps)
        return out

    def _attention(self, qkv: Tensor, plan: AttentionPlan) -> Tensor:
        """[T, 3 H] -> context [T, H]; a sequence attends to itself only."""
        rows = qkv if plan.gather is None else qkv.index_select(0, plan.gather)
        context = torch.empty_like(rows[:, : self.config.hidden_size])
        for bucket in plan.buckets:
            self._attend(bucket, rows, context)
        return context if plan.scatter is None else context.index_select(0, plan.scatter)

    def _attend(self, bucket: AttentionBucket, rows: Tensor, context: Tensor) -> None:
        n, length, config = bucket.count, bucket.length, self.config
        span = slice(bucket.first, bucket.first + n * length)
        split = rows[span].view(n, length, 3, config.num_heads, config.head_size)
        q, k, v = (split[:, :, part].transpose(1, 2) for part in range(3))  # [n, A, L, D]
        bias = self._score_bias(bucket)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        context[span].view(n, length, config.num_heads, config.head_size).copy_(out.transpose(1, 2))

    def _score_bias(self, bucket: AttentionBucket) -> Tensor | None:
        if self._relative is None:
            return bucket.mask
        bias = self._relative_bias(bucket.length).unsqueeze(0)
        return bias if bucket.mask is None else bias.masked_fill(~bucket.mask, float("-inf"))

    def _relative_bias(self, length: int) -> Tensor:
        """[A, L, L]: MPNet's bias for every pair of positions, one table for all layers."""
        if length not in self._relative_by_length:
            assert self._relative is not None
            positions = torch.arange(length, device=self._relative.device)
            buckets = _relative_buckets(positions[None, :] - positions[:, None], self.config.relative_buckets)
            self._relative_by_length[length] = F.embedding(buckets, self._relative).permute(2, 0, 1).contiguous()
        return self._relative_by_length[length]


def _relative_buckets(distance: Tensor, num_buckets: int, max_distance: int = 128) -> Tensor:
    """Bucket of key position - query position: half of the buckets for each sign, exact near, logarithmic afar.

    Source: the bucketing of T5, Raffel et al. 2020, arXiv:1910.10683, as MPNet uses it.
    """
    half = num_buckets // 2
    exact = half // 2
    sign = (distance > 0).to(torch.int64) * half
    n = distance.abs()
    far = exact + (
        torch.log(n.clamp(min=1).float() / exact) / torch.log(torch.tensor(max_distance / exact)) * (half - exact)
    ).to(torch.int64)
    return sign + torch.where(n < exact, n, far.clamp(max=half - 1))
