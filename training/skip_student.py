"""`SkipStudent`: an encoder whose lower layers see one n-gram at a time, as an autograd module over padded batches.

What it computes is in vbert/local_layers.py in words and formulas; this is the implementation that is trained, and it
shares no code with the one that serves. Other students, to compare with, differ in what lies below the merge:

- *trigram*: local layers on (left, centre, right); each token adds up what three tri-grams say of it;
- *unigram*: the same with a window of one token, a plain table in the end;
- *window*: one local layer for the centre token only, whose keys and values are functions of single tokens;
- *full*: ordinary layers over the whole sequence: a plain, shallower encoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vbert.activations import activate
from vbert.config import LINEAR_SITES, NORM_SITES, EncoderConfig
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import Backbone

__all__ = ["KINDS", "Batch", "Layer", "SkipShape", "SkipStudent", "Teacher", "random_kept"]

KINDS = ("trigram", "unigram", "window", "full")
_GATES = (0.12, 0.73, 0.12)  # how much of a token each view says at the start
_TYPICAL_LENGTH = 32  # positions over which the teacher's position embeddings are averaged


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipShape:
    """skipped: layers of the teacher that are replaced. lower: layers in their place. upper: teacher layers that stay
    above, counted from 0. window: tokens of the kind *window*."""

    kind: str
    skipped: int
    lower: int
    upper: tuple[int, ...]
    sinks: int = 2
    window: int = 5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind is {self.kind!r}; one of {', '.join(KINDS)} is known")
        if not self.upper or list(self.upper) != sorted(set(self.upper)) or self.skipped < 1:
            raise ConfigError(f"skipped {self.skipped}, upper layers {self.upper}: give ascending layers, skip one at least")


@dataclass(frozen=True, slots=True)
class Batch:
    """token_ids, type_ids: [B, n] int64. mask: [B, n] bool, True at real tokens, which come first."""

    token_ids: Tensor
    type_ids: Tensor
    mask: Tensor


class Layer(nn.Module):
    """One transformer layer; what attends to what is the caller's."""

    def __init__(self, config: EncoderConfig, weights: dict[str, Tensor], layer: int) -> None:
        super().__init__()
        self.config = config
        for site in LINEAR_SITES:
            linear = nn.Linear(config.site_in(site), config.site_out(site))
            self.add_module(site, linear)
        for site in ("attn_norm", "ffn_norm"):
            self.add_module(site, nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps))
        self.load_state_dict(
            {name: weights[f"layers.{layer}.{name}"] for name in self.state_dict()}, strict=True
        )

    def heads(self, rows: Tensor) -> Tensor:
        """[..., n, H] to [..., A, n, D]."""
        return rows.unflatten(-1, (self.config.num_heads, self.config.head_size)).transpose(-3, -2)

    def close(self, entered: Tensor, context: Tensor) -> Tensor:
        """The rest of the layer after attention, [..., H]."""
        hidden = self.attn_norm(entered + self.attn_out(context))
        return self.ffn_norm(hidden + self.ffn_down(activate(self.ffn_up(hidden), self.config.activation)))

    def forward(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """[B, n, H], ordinary attention."""
        q, k, v = (self.heads(getattr(self, site)(hidden)) for site in "qkv")
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.close(hidden, context.transpose(-3, -2).flatten(-2))

    def scores(self, hidden: Tensor) -> Tensor:
        """[B, A, n, n] before the mask and the softmax."""
        q, k = self.heads(self.q(hidden)), self.heads(self.k(hidden))
        return q @ k.transpose(-1, -2) / math.sqrt(self.config.head_size)


class LocalLayer(Layer):
    """A layer over the slots of an n-gram and some constant keys and values ("sinks"), which stand for the rest of a
    text: without them the few slots would get all of the attention that the teacher gives to far tokens."""

    def __init__(self, config: EncoderConfig, weights: dict[str, Tensor], layer: int, sinks: Tensor) -> None:
        """sinks: [S, H] states whose keys and values the constants begin with."""
        super().__init__(config, weights, layer)
        with torch.no_grad():
            self.sink_keys, self.sink_values = (nn.Parameter(site(sinks)) for site in (self.k, self.v))

    def forward(self, hidden: Tensor, present: Tensor) -> Tensor:
        """hidden: [m, s, H]; present: [m, s] bool."""
        m, num_sinks = len(hidden), len(self.sink_keys)
        k, v = self.k(hidden), self.v(hidden)
        k = torch.cat([self.sink_keys.to(k.dtype).expand(m, -1, -1), k], 1)
        v = torch.cat([self.sink_values.to(v.dtype).expand(m, -1, -1), v], 1)
        mask = torch.cat([present.new_ones(m, num_sinks), present], 1)
        q, k, v = self.heads(self.q(hidden)), self.heads(k), self.heads(v)  # [m, A, s or S + s, D]
        scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(self.config.head_size)
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
        context = scores.softmax(-1).to(v.dtype) @ v
        return self.close(hidden, context.transpose(1, 2).flatten(2))


class WindowLayer(Layer):
    """A layer for the centre token of a window, whose keys and values come from single tokens and their distance."""

    def __init__(self, config: EncoderConfig, weights: dict[str, Tensor], layer: int, sinks: Tensor, window: int) -> None:
        super().__init__(config, weights, layer)
        with torch.no_grad():
            self.sink_keys, self.sink_values = (nn.Parameter(site(sinks)) for site in (self.k, self.v))
        self.far_keys = nn.Parameter(torch.zeros(window, config.hidden_size))
        self.far_values = nn.Parameter(torch.zeros(window, config.hidden_size))
        self.reach = window // 2

    def forward(self, rows: Tensor, inverse: Tensor, mask: Tensor) -> Tensor:
        """rows: [m, H] of distinct tokens; inverse: [B, n] which; mask: [B, n]."""
        shape = (self.config.num_heads, self.config.head_size)
        q, k, v = (getattr(self, site)(rows) for site in "qkv")
        window = [torch.roll(inverse, -d, 1) for d in range(-self.reach, self.reach + 1)]
        n = inverse.shape[1]
        at = torch.arange(n, device=inverse.device)
        there = []
        for d in range(-self.reach, self.reach + 1):
            inside = (at + d >= 0) & (at + d < n)
            there.append(torch.roll(mask, -d, 1) & inside)
        present, which = torch.stack(there, 2)[mask], torch.stack(window, 2)[mask]  # [T, w]
        keys, values = k[which] + self.far_keys.to(k.dtype), v[which] + self.far_values.to(v.dtype)
        total = len(which)
        keys = torch.cat([self.sink_keys.to(k.dtype).expand(total, -1, -1), keys], 1).unflatten(2, shape)
        values = torch.cat([self.sink_values.to(v.dtype).expand(total, -1, -1), values], 1).unflatten(2, shape)
        queries = q[inverse[mask]].unflatten(1, shape)
        scores = torch.einsum("tad,tsad->tas", queries, keys).float() / math.sqrt(shape[1])
        allowed = torch.cat([present.new_ones(total, len(self.sink_keys)), present], 1)
        weights = scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1).to(values.dtype)
        context = torch.einsum("tas,tsad->tad", weights, values).flatten(1)
        return self.close(rows[inverse[mask]], context)  # [T, H]


class Teacher(nn.Module):
    """The plain encoder, frozen."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        config, weights = backbone.config, backbone.weights
        self.config, self.offset = config, config.position_offset
        self.embeddings = Embeddings(config, weights)
        self.layers = nn.ModuleList(Layer(config, weights, i) for i in range(config.num_layers))
        self.requires_grad_(False)

    def forward(self, batch: Batch) -> list[Tensor]:
        """Hidden states [B, n, H]: of the embeddings, then after each layer."""
        bias = attention_bias(batch.mask)
        states = [self.embeddings(batch)]
        for layer in self.layers:
            states.append(layer(states[-1], bias))
        return states


class Embeddings(nn.Module):
    """Word, position and type embeddings and their LayerNorm."""

    def __init__(self, config: EncoderConfig, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.word = nn.Parameter(weights["word_embeddings"], requires_grad=False)
        self.position = nn.Parameter(weights["position_embeddings"].clone())
        types = weights.get("type_embeddings")
        self.kinds = nn.Parameter(torch.zeros(1, config.hidden_size) if types is None else types.clone())
        self.norm = _norm_of(config, weights["emb_norm.weight"], weights["emb_norm.bias"])

    def forward(self, batch: Batch) -> Tensor:
        positions = torch.arange(batch.token_ids.shape[1], device=batch.token_ids.device)
        if self.config.position_offset:
            real = (batch.token_ids != self.config.pad_token_id).long()
            positions = real.cumsum(1) * real + self.config.pad_token_id
        types = self.kinds[batch.type_ids.clamp(max=len(self.kinds) - 1)]
        return self.norm(self.word[batch.token_ids] + self.position[positions] + types)


class SkipStudent(nn.Module):
    """Parameters are named as vbert/formats/skip_folder.py names tensors, where there is a folder of its kind."""

    def __init__(self, backbone: Backbone, shape: SkipShape, sinks: Tensor) -> None:
        """sinks: [skipped, S, H], teacher states that enter each layer, which stand for far tokens at the start."""
        super().__init__()
        config, weights = backbone.config, backbone.weights
        if config.relative_buckets:
            raise ConfigError(f"a {config.model_type} encoder has relative positions, and no skip student")
        self.config, self.shape = config, shape
        self.slots = 3 if shape.kind == "trigram" else 1
        self.word = nn.Parameter(weights["word_embeddings"], requires_grad=False)
        if shape.kind == "full":
            self.embeddings = Embeddings(config, weights)
            self.embeddings.word = self.word
            self.local = nn.ModuleList(Layer(config, weights, i) for i in range(shape.lower))
        else:
            self.position_embeddings = nn.Parameter(_slot_positions(config, weights, self.slots))
            self.emb_norm = _norm_of(config, weights["emb_norm.weight"], weights["emb_norm.bias"])
            make = (
                (lambda i: WindowLayer(config, weights, i, sinks[i], shape.window))
                if shape.kind == "window"
                else (lambda i: LocalLayer(config, weights, i, sinks[i]))
            )
            self.local = nn.ModuleList(make(i) for i in range(shape.lower))
            gates = _GATES if self.slots == 3 else (0.97,)
            self.gate_weight = nn.Parameter(torch.zeros(self.slots, config.hidden_size))
            self.gate_bias = nn.Parameter(torch.logit(torch.tensor(gates)))
            self.merge_position = nn.Parameter(torch.zeros(config.max_length, config.hidden_size))
            self.merge_type = nn.Parameter(torch.zeros(max(1, config.type_vocab_size), config.hidden_size))
            self.merge_norm = _norm_of(config, torch.ones(config.hidden_size), torch.zeros(config.hidden_size))
            if shape.lower:  # what scales the last local layer's rows comes after they are added up
                last = self.local[-1].ffn_norm
                self.merge_norm.load_state_dict(last.state_dict())
                nn.init.ones_(last.weight)
                nn.init.zeros_(last.bias)
            else:
                self.merge_norm.load_state_dict(self.emb_norm.state_dict())
        self.upper = nn.ModuleList(Layer(config, weights, i) for i in shape.upper)

    def forward(self, batch: Batch, kept: Tensor | None = None) -> list[Tensor]:
        """Hidden states [B, n, H]: what enters the upper layers, then after each. kept: [B, n], how many tokens of the
        n-gram around each are looked at: 3, 2 without the left one, 1."""
        bias = attention_bias(batch.mask)
        states = [self.enter(batch, kept, bias)]
        for layer in self.upper:
            states.append(layer(states[-1], bias))
        return states

    def enter(self, batch: Batch, kept: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.shape.kind == "full":
            hidden = self.embeddings(batch)
            for layer in self.local:
                hidden = layer(hidden, bias)
            return hidden
        if self.shape.kind == "window":
            distinct, inverse = torch.unique(batch.token_ids, return_inverse=True)
            rows = self.emb_norm(self.word[distinct] + self.position_embeddings[0])
            flat = self.local[0](rows, inverse, batch.mask)
            flat = flat * self._gates(flat[:, None])[:, 0]
            merged = flat.new_zeros(*batch.mask.shape, flat.shape[-1])
            merged[batch.mask] = flat
        else:
            merged = self._merged(batch, kept)
        places = torch.arange(merged.shape[1], device=merged.device)
        types = self.merge_type[batch.type_ids.clamp(max=len(self.merge_type) - 1)]
        return self.merge_norm(merged + self.merge_position[places] + types)

    def ngrams(self, batch: Batch, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distinct n-grams [m, s] of token ids, -1 where there is none, and which each token is the centre of [B, n]."""
        ids = torch.where(batch.mask, batch.token_ids, -1)
        if self.slots == 3:
            nothing = ids.new_full((len(ids), 1), -1)
            left, right = torch.cat([nothing, ids[:, :-1]], 1), torch.cat([ids[:, 1:], nothing], 1)
            if kept is not None:
                left, right = torch.where(kept > 2, left, -1), torch.where(kept > 1, right, -1)
            key = ((left + 1) << 42) | ((ids + 1) << 21) | (right + 1)
        else:
            key = ids + 1
        key = torch.where(batch.mask, key, key[0, 0])
        distinct, inverse = torch.unique(key, return_inverse=True)
        shifts = (42, 21, 0) if self.slots == 3 else (0,)
        return torch.stack([((distinct >> s) & 0x1FFFFF) - 1 for s in shifts], 1), inverse

    def encode(self, grams: Tensor) -> Tensor:
        """[m, s] token ids, -1 missing, to gated rows [m, s, H]."""
        present = grams >= 0
        hidden = self.emb_norm(self.word[grams.clamp(min=0)] + self.position_embeddings)
        for layer in self.local:
            hidden = layer(hidden, present)
        return hidden * self._gates(hidden) * present[..., None].to(hidden.dtype)

    def _gates(self, rows: Tensor) -> Tensor:
        """[m, s, H] to [m, s, 1]."""
        return torch.sigmoid((rows.float() * self.gate_weight).sum(-1, keepdim=True) + self.gate_bias[:, None]).to(rows.dtype)

    def _merged(self, batch: Batch, kept: Tensor | None) -> Tensor:
        """[B, n, H]: what the n-grams around each token say of it, added up."""
        grams, inverse = self.ngrams(batch, kept)
        rows = self.encode(grams)
        mask = batch.mask[..., None].to(rows.dtype)
        if self.slots == 1:
            return rows[:, 0][inverse] * mask
        views = rows[inverse]  # [B, n, 3, H]
        views = views * mask[..., None]
        merged = views[:, :, 1].clone()
        merged[:, :-1] += views[:, 1:, 0]
        merged[:, 1:] += views[:, :-1, 2]
        return merged * mask


def random_kept(shape: torch.Size, share: float, device: torch.device) -> Tensor:
    """[B, n] as a back-off leaves it: a `share` of the n-grams is shortened, a third of these to the token itself."""
    draw = torch.rand(shape, device=device)
    return 3 - (draw < share).long() - (draw < share / 3).long()


def attention_bias(mask: Tensor) -> Tensor | None:
    """[B, 1, 1, n]: -inf at padding; None where there is none."""
    if bool(mask.all()):
        return None
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)[:, None, None]


def _norm_of(config: EncoderConfig, weight: Tensor, bias: Tensor) -> nn.LayerNorm:
    norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    norm.load_state_dict({"weight": weight, "bias": bias})
    return norm


def _slot_positions(config: EncoderConfig, weights: dict[str, Tensor], slots: int) -> Tensor:
    """[s, H]: what neighbouring places add on average in the teacher, the token type included."""
    table, first = weights["position_embeddings"], config.position_offset
    rows = torch.stack([table[first + k : first + k + _TYPICAL_LENGTH].mean(0) for k in range(slots)])
    types = weights.get("type_embeddings")
    return rows if types is None else rows + types[0]
