"""`TenantModel`: a frozen backbone with trainable deltas and a head, as one small autograd module over padded batches.

This is the forward that training and self-test vectors rest on. It shares nothing but the table of activations with
the packed encoder that serves, and nothing with the dense reference: three implementations must agree. Everything
below the lowest delta is the same in every epoch: `frozen_rows` computes it once, `forward` goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.deltas import BottleneckDelta, TrainableDelta
from training.head import TrainableHead
from training.skip_layers import attend
from training.skip_student import Batch, hashed_kept, read_lower
from vbert.activations import activate
from vbert.config import EMBEDDING_LAYER
from vbert.formats.transformers_folder import Backbone
from vbert.tenant import Exit

__all__ = ["PaddedBatch", "TenantModel", "Traced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedBatch:
    """B sequences of up to n rows, padded on the right: tokens, or what `frozen_rows` made of them.

    mask: [B, n] bool, True at real rows. token_ids, type_ids: [B, n] int64. rows: [B, n, H]. path: the way that tokens
    take through the lower layers. kept: [B, n], tokens of each n-gram that `backoff` keeps; None: a share is shortened.
    """

    mask: Tensor
    token_ids: Tensor | None = None
    type_ids: Tensor | None = None
    rows: Tensor | None = None
    path: str = "plain"
    kept: Tensor | None = None

    def tokens(self) -> Batch:
        """For a forward from the embeddings on."""
        assert self.token_ids is not None
        assert self.type_ids is not None
        return Batch(self.token_ids, self.type_ids, self.mask)


class Traced(NamedTuple):
    """outputs: as `TenantModel.outputs`. What training changes: states [B, n, H] by how many layers are below them, and
    attention scores [B, A, n, n] by layer, where they were asked for."""

    outputs: list[Tensor]
    states: dict[int, Tensor]
    scores: dict[int, Tensor]


class TenantModel(nn.Module):
    """Its parameters are those of the deltas and the head; the backbone's weights are no part of the state dict."""

    def __init__(
        self,
        backbone: Backbone,
        deltas: Sequence[TrainableDelta],
        head: TrainableHead,
        *,
        paths: Sequence[str] = ("plain",),
        backoff_share: float = 0.5,
        exits: Mapping[int, TrainableHead] | None = None,
    ) -> None:
        """paths: the ways through the lower layers that it learns. backoff_share: of n-grams shortened on `backoff`.
        exits: heads that read what enters a layer, by ascending layer."""
        super().__init__()
        self.paths, self._backoff_share = tuple(paths), backoff_share
        self._lower: list[nn.Module] = []  # a list: no part of the state dict
        self._above_lower = 0
        if self.paths != ("plain",) and backbone.skip is not None:
            self.skip_with(read_lower(backbone), backbone.skip.config.first_layer)
        self.config, self.weights = backbone.config, backbone.weights
        self.trainables, self.deltas, self.head = tuple(deltas), nn.ModuleList(deltas), head
        self.exit_layers = tuple(exits or ())
        self.exits = nn.ModuleList((exits or {}).values())
        self._halved: dict[str, Tensor] = {}
        self.lowest_layer = min((*(delta.layer for delta in deltas), *self.exit_layers), default=self.config.num_layers)
        self._at: dict[tuple[int, str], list[TrainableDelta]] = {}
        for delta in deltas:
            self._at.setdefault((delta.layer, delta.site.split(".")[0]), []).append(delta)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TenantModel:
        self.weights = {name: fn(weight) for name, weight in self.weights.items()}
        self._halved = {name: fn(weight) for name, weight in self._halved.items()}
        self._lower = [lower._apply(fn) for lower in self._lower]  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def skip_with(self, lower: nn.Module, first_layer: int) -> None:
        """On other paths than plain, `lower` gives what enters a layer: it takes a Batch and what its n-grams keep."""
        self._lower, self._above_lower = [lower], first_layer

    def halve_products(self, half: bool) -> None:
        """In the layers products are of bfloat16, or of float32 again. States and heads stay float32."""
        linears = [name for name in self.weights if name.startswith("layers.") and self.weights[name].ndim == 2]
        self._halved = {name: self.weights[name].bfloat16() for name in linears} if half else {}

    @property
    def device(self) -> torch.device:
        return self.weights["word_embeddings"].device

    @property
    def pools_first(self) -> bool:
        """True where only a head over pooled states is trained: then one pooled row a sequence is all it needs."""
        return self.lowest_layer == self.config.num_layers and self.head.pooling != "none"

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Head outputs before softmax: [B, C], or [B, n, C] of a token head."""
        return self.outputs(batch)[-1]

    def outputs(self, batch: PaddedBatch) -> list[Tensor]:
        """The same of every exit, and then of the head."""
        return self.traced(batch).outputs

    def traced(self, batch: PaddedBatch, *, with_scores: bool = False) -> Traced:
        """`outputs`, and what is computed on the way to them."""
        if batch.rows is None:
            batch = self.frozen_rows(batch)
        assert batch.rows is not None
        heads = dict(zip((*self.exit_layers, self.config.num_layers), (*self.exits, self.head), strict=True))
        lowest = min((delta.layer for delta in self.trainables), default=self.config.num_layers)
        first, hidden = max(self.lowest_layer, 0), batch.rows
        traced = Traced([heads[first](hidden, batch.mask)] if first in heads else [], {}, {})
        for layer in range(first, self.config.num_layers):
            if with_scores and layer >= lowest:
                traced.scores[layer] = self._scores(layer, hidden)
            hidden = self._layers(hidden, batch.mask, layer, layer + 1)
            if layer >= lowest:
                traced.states[layer + 1] = hidden
            if layer + 1 in heads:
                traced.outputs.append(heads[layer + 1](hidden, batch.mask))
        return traced

    def exported_exits(self) -> tuple[Exit, ...]:
        heads = [head for head in self.exits if isinstance(head, TrainableHead)]
        return tuple(Exit(layer=i, head=head.export()) for i, head in zip(self.exit_layers, heads, strict=True))

    def mean_states(self, batch: PaddedBatch) -> Tensor:
        """[B, H]: the mean of the last states of each sequence, before any head. For a model without deltas."""
        hidden, first = (self._embed(batch), 0) if batch.path == "plain" else self._skipped(batch)
        hidden = self._layers(hidden, batch.mask, first, self.config.num_layers)
        weights = batch.mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def frozen_rows(self, batch: PaddedBatch) -> PaddedBatch:
        """What no training step changes: the states below the lowest delta, pooled already where there is no delta.

        A pooled sequence is a sequence of one row, which either pooling leaves as it is.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.lowest_layer == EMBEDDING_LAYER):
            hidden, first = (self._embed(batch), 0) if batch.path == "plain" else self._skipped(batch)
            rows, mask = self._layers(hidden, batch.mask, first, self.lowest_layer), batch.mask
            if self.pools_first:
                rows, mask = self.head.pool(rows, mask)[:, None], mask[:, :1]
        return PaddedBatch(rows=rows, mask=mask)

    def _embed(self, batch: PaddedBatch) -> Tensor:
        assert batch.token_ids is not None
        assert batch.type_ids is not None
        positions = self._position_ids(batch.token_ids)
        hidden = self.weights["word_embeddings"][batch.token_ids] + self.weights["position_embeddings"][positions]
        if "type_embeddings" in self.weights:
            hidden = hidden + self.weights["type_embeddings"][batch.type_ids]
        return self._norm(EMBEDDING_LAYER, "emb_norm", hidden)

    def _skipped(self, batch: PaddedBatch) -> tuple[Tensor, int]:
        """What the n-grams of a batch give, [B, n, H], and the first layer above them."""
        (lower,) = self._lower
        tokens, kept = batch.tokens(), batch.kept
        if batch.path == "backoff" and kept is None:
            kept = hashed_kept(tokens, self._backoff_share)
        with self._autocast():
            rows: Tensor = lower(tokens, kept)
        return rows.float(), self._above_lower

    def _position_ids(self, token_ids: Tensor) -> Tensor:
        """0, 1, 2, ...; with an offset as RoBERTa counts: a padding token, also one in a text, gets pad_token_id."""
        if not self.config.position_offset:
            return torch.arange(token_ids.shape[1], device=token_ids.device)
        real = (token_ids != self.config.pad_token_id).long()
        return real.cumsum(1) * real + self.config.pad_token_id

    def _layers(self, hidden: Tensor, mask: Tensor, first: int, last: int) -> Tensor:
        bias = self._attention_bias(mask)
        with self._autocast():
            for layer in range(first, last):
                hidden = self._sub_layer(layer, "attn", hidden, self._attention(layer, hidden, bias))
                up = activate(self._linear(layer, "ffn_up", hidden), self.config.activation)
                hidden = self._sub_layer(layer, "ffn", hidden, self._linear(layer, "ffn_down", up))
        return hidden.float()  # [B, n, H]

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self._halved else nullcontext()

    def _attention(self, layer: int, hidden: Tensor, bias: Tensor | None) -> Tensor:
        shape = (*hidden.shape[:2], self.config.num_heads, self.config.head_size)
        q, k, v = (self._linear(layer, site, hidden).view(shape).transpose(1, 2) for site in "qkv")
        return self._linear(layer, "attn_out", attend(q, k, v, bias))

    def _scores(self, layer: int, hidden: Tensor) -> Tensor:
        """[B, A, n, n] of attention, before the mask and the softmax."""
        shape = (*hidden.shape[:2], self.config.num_heads, self.config.head_size)
        with self._autocast():
            q, k = (self._linear(layer, site, hidden).view(shape).transpose(1, 2) for site in "qk")
            return q @ k.transpose(-1, -2) / math.sqrt(self.config.head_size)

    def _sub_layer(self, layer: int, sub: str, entered: Tensor, output: Tensor) -> Tensor:
        """Residual and LayerNorm around a sub-layer, with a bottleneck between its taps where there is one."""
        norm = f"{sub}_norm"
        for delta in self._at.get((layer, sub), ()):
            assert isinstance(delta, BottleneckDelta)
            if delta.in_tap == "input":
                output = output + delta(entered)
            elif delta.in_tap == "output":
                output = output + delta(output)
            else:
                output = output + delta(self._norm(layer, norm, output + entered))
        return self._norm(layer, norm, output + entered)

    def _linear(self, layer: int, site: str, rows: Tensor) -> Tensor:
        weight, bias = f"layers.{layer}.{site}.weight", f"layers.{layer}.{site}.bias"
        out = F.linear(rows, self._halved.get(weight, self.weights[weight]), self.weights[bias])
        for delta in self._at.get((layer, site), ()):
            out = out + delta(rows)
        return out

    def _norm(self, layer: int, site: str, rows: Tensor) -> Tensor:
        name = site if layer == EMBEDDING_LAYER else f"layers.{layer}.{site}"
        bias = self.weights[f"{name}.bias"]
        for delta in self._at.get((layer, site), ()):
            bias = bias + delta(rows)
        return F.layer_norm(rows, rows.shape[-1:], self.weights[f"{name}.weight"], bias, self.config.layer_norm_eps)

    def _attention_bias(self, mask: Tensor) -> Tensor | None:
        """What is added to attention scores, [B or 1, heads or 1, n or 1, n]: relative positions, -inf at padding."""
        bias = (
            None
            if bool(mask.all())
            else torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)[:, None, None]
        )
        if "relative_attention_bias" in self.weights:
            buckets = _relative_buckets(mask.shape[1], self.config.relative_buckets).to(mask.device)
            relative = self.weights["relative_attention_bias"][buckets].permute(2, 0, 1)[None]  # [1, heads, n, n]
            bias = relative if bias is None else relative + bias
        return bias


def _relative_buckets(length: int, num_buckets: int, max_distance: int = 128) -> Tensor:
    """Bucket of key position minus query position, [length, length]: a half for each sign, near distances exact, far
    ones logarithmic. Source: Raffel et al. 2019, arXiv:1910.10683, section 2.1; MPNet shares one table."""
    positions = torch.arange(length)
    distance = positions[None] - positions[:, None]
    half, exact = num_buckets // 2, num_buckets // 4
    near, behind = distance.abs(), half * (distance > 0)
    far = exact + (torch.log(near.clamp(min=1) / exact) / math.log(max_distance / exact) * (half - exact)).long()
    return behind + torch.where(near < exact, near, far.clamp(max=half - 1))
