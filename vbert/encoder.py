"""The frozen shared encoder: embeddings, feed-forward, and one step `layer(i, ...)` of a packed batch.

Weights of BERT, RoBERTa, XLM-R, DistilBERT and MPNet come under one set of names (vbert/formats/names.py), so there is
one code path. It knows nothing of tenants but the `BatchDeltas` it asks at each site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from vbert.activations import activate_
from vbert.arena import ResidentTenant
from vbert.attention import Attention, PackedAttention, RelativeBias, VarlenAttention
from vbert.batch import PackedRows
from vbert.config import EMBEDDING_LAYER, EncoderConfig
from vbert.deltas import BatchDeltas
from vbert.kernels.few_rows import few_rows_linear, is_worth_it
from vbert.kernels.half_linear import half_linear, packed, takes_half
from vbert.rows import RowSource
from vbert.workspace import Workspace

__all__ = ["Encoder"]


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor  # [out, in], or packed
    bias: Tensor  # [out]

    def __call__(self, x: Tensor, name: str, space: Workspace) -> Tensor:
        """x [T, in] to [T, out], which may be in the buffer of that name."""
        if takes_half(x):
            return half_linear(x, self.weight, self.bias, name, space)
        out = space.rows(name, x.shape[0], self.bias.shape[0])
        if is_worth_it(x):
            return few_rows_linear(x, self.weight, self.bias, out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)


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
    """A frozen encoder in one dtype on one device. Source: Devlin et al. 2019, arXiv:1810.04805."""

    def __init__(
        self,
        config: EncoderConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        words: RowSource | None = None,
        *,
        packs: bool = True,
    ) -> None:
        """weights: the canonical float32 tensors of vbert/formats/transformers_folder.py, or with q, k and v in one,
        which is used as it is where dtype and device are those. words: the word embeddings,
        of this dtype, where they are not to be kept in memory. packs: linears may lie in memory as the machine wants
        them; not where the weights are only looked at."""
        self.config, self.dtype, self.device, self._words = config, dtype, device, words

        def get(name: str) -> Tensor:
            return weights[name].to(device=device, dtype=dtype)

        def linear(*prefixes: str) -> _Linear:
            """Several in one, their outputs side by side."""
            weights, biases = ([get(f"{prefix}.{part}") for prefix in prefixes] for part in ("weight", "bias"))
            weight = torch.cat(weights) if len(prefixes) > 1 else weights[0]
            in_order = packed(weight) if packs else None
            return _Linear(weight if in_order is None else in_order, torch.cat(biases) if biases[1:] else biases[0])

        def norm(prefix: str) -> _Norm:
            return _Norm(get(f"{prefix}.weight"), get(f"{prefix}.bias"))

        def qkv(prefix: str) -> _Linear:
            if f"{prefix}.qkv.weight" in weights:
                return linear(f"{prefix}.qkv")
            return linear(*(f"{prefix}.{site}" for site in ("q", "k", "v")))

        self._word = get("word_embeddings") if words is None else None
        self._position = get("position_embeddings")
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
        self._relative = RelativeBias(get("relative_attention_bias")) if config.relative_buckets else None

    @classmethod
    def of_tenant(cls, config: EncoderConfig, tenant: ResidentTenant) -> Encoder:
        """Of a tenant with weights of its own: views of its slot, nothing is copied."""
        ((arena_class, slot),) = tenant.slots
        weights = {}
        for (layer, site), (_, parts) in arena_class.at.items():
            for part, every in parts.items():
                name = f"layers.{layer}.{site}.{part}" if layer != EMBEDDING_LAYER else f"{site}.{part}"
                weights[name if site == "emb_norm" or layer != EMBEDDING_LAYER else site] = every[slot]
        return cls(config, weights, arena_class.values.dtype, arena_class.values.device, packs=False)

    @property
    def num_bytes(self) -> int:
        """Of all weights, those shared with the backbone that was read included."""
        return sum(tensor.nbytes for tensor in _tensors(list(vars(self).values())))

    @property
    def takes_varlen(self) -> bool:
        """Whether attention is FlashAttention over packed rows; else it is done in padded buckets."""
        fits = self._relative is None and self.dtype != torch.float32 and self.config.head_size % 8 == 0
        return self.device.type == "cuda" and fits and self.config.head_size <= 256

    def mapped_words(self, rows: PackedRows) -> Tensor | None:
        """[T, H] word rows from the source this encoder was given, on its device. rows: in host memory."""
        if self._words is None:
            return None
        pinned = self.device.type == "cuda"
        gathered = torch.empty(len(rows.token_ids), self._words.width, dtype=self.dtype, pin_memory=pinned)
        self._words.gather(rows, gathered)
        return gathered.to(self.device, non_blocking=pinned)

    def word_rows(self, rows: PackedRows) -> Tensor:
        """[T, H] word rows on its device. rows: in host memory."""
        if (mapped := self.mapped_words(rows)) is not None:
            return mapped
        assert self._word is not None
        return F.embedding(rows.token_ids.to(self.device), self._word)

    def embed(self, rows: PackedRows, deltas: BatchDeltas, word_rows: Tensor | None = None) -> Tensor:
        """Token rows to the hidden states that enter layer 0, [T, H]. word_rows: [T, H], read in place of a look-up."""
        if word_rows is None:
            assert self._word is not None  # else the caller asked `mapped_words`
            hidden = F.embedding(rows.token_ids, self._word)
        else:
            hidden = word_rows.clone()
        if self._type is not None:
            hidden = hidden.add_(F.embedding(rows.type_ids, self._type))
        hidden = hidden.add_(F.embedding(rows.position_ids, self._position))
        return self._normed(hidden, self._emb_norm, EMBEDDING_LAYER, "emb_norm", deltas)

    def attention(self, rows: PackedRows) -> Attention:
        """The attention of this batch, for every `layer` call."""
        if self.takes_varlen:
            assert rows.cu_seqlens_dev is not None  # the batch was moved
            return VarlenAttention(rows.cu_seqlens_dev, rows.longest, self.config.num_heads)
        return PackedAttention(rows.attention, self.config.num_heads, self._relative)

    def layer(self, i: int, hidden: Tensor, attention: Attention, deltas: BatchDeltas, space: Workspace) -> Tensor:
        """One transformer layer with every tenant's deltas, [T, H] -> [T, H]. What it returns is not in `space`."""
        layer = self._layers[i]
        qkv = layer.qkv(hidden, "qkv", space)
        sites = dict(zip(("q", "k", "v"), qkv.chunk(3, dim=1), strict=True))
        deltas.after_linear(i, hidden, sites)
        context = deltas.before_linear(i, "attn_out", attention(qkv), in_place=True)
        out = layer.attn_out(context, "out", space)
        deltas.after_linear(i, context, {"attn_out": out})
        hidden = self._close(i, "attn", hidden, out, layer.attn_norm, deltas)

        x = deltas.before_linear(i, "ffn_up", hidden)
        wide = layer.ffn_up(x, "wide", space)
        deltas.after_linear(i, x, {"ffn_up": wide})
        wide = deltas.before_linear(i, "ffn_down", activate_(wide, self.config.activation), in_place=True)
        out = layer.ffn_down(wide, "out", space)
        deltas.after_linear(i, wide, {"ffn_down": out})
        return self._close(i, "ffn", hidden, out, layer.ffn_norm, deltas)

    def _close(self, i: int, sub: str, entered: Tensor, out: Tensor, norm: _Norm, deltas: BatchDeltas) -> Tensor:
        """Bottlenecks around a sub-layer, the residual and the LayerNorm. `out` is overwritten."""
        deltas.bottleneck(i, f"{sub}.input>output", entered, out)
        deltas.bottleneck(i, f"{sub}.output>output", out, out)
        if (span := deltas.bottleneck_rows(i, f"{sub}.normed>output")) is not None:
            total = torch.empty_like(out)  # only the rows that are read are ever filled
            torch.add(out[span], entered[span], out=total[span])
            normed = self._normed(total, norm, i, f"{sub}_norm", deltas, span)
            deltas.bottleneck(i, f"{sub}.normed>output", normed, out)
        hidden = self._normed(out.add_(entered), norm, i, f"{sub}_norm", deltas)
        deltas.bottleneck(i, f"{sub}.after>after", hidden, hidden)
        return hidden

    def _normed(
        self, rows: Tensor, norm: _Norm, layer: int, site: str, deltas: BatchDeltas, span: slice | None = None
    ) -> Tensor:
        """LayerNorm of `rows` [T, H], of those in `span` only where one is given."""
        eps, width = self.config.layer_norm_eps, (rows.shape[1],)
        if span is None:
            out = F.layer_norm(rows, width, norm.weight, norm.bias, eps)
        else:
            out = torch.empty_like(rows)
            out[span] = F.layer_norm(rows[span], width, norm.weight, norm.bias, eps)
        deltas.norm(layer, site, rows, out, eps)
        return out


def _tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in nested sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, _Linear | _Norm | _Layer):
        yield from _tensors([getattr(value, field.name) for field in fields(value)])
