"""`SkipStudent`: an encoder with another lower end, as an autograd module over padded batches.

What is distilled for serving is the lower end of n-grams (vbert/local_layers.py says in formulas what it computes);
this is the implementation that is trained, and it shares no code with the one that serves. The others are there to be
compared with it:

- *trigram*: local layers on (left, centre, right); a token is what three tri-grams say of it, added up;
- *unigram*: the same with a window of one token: a plain table in the end;
- *window*: one local layer for the centre of a window only, whose keys and values are functions of single tokens;
- *full*: ordinary layers over the whole text: a plain, shallower encoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.skip_layers import FullLayer, LocalLayer, SinkBlock, WindowLayer
from vbert.config import EncoderConfig
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import Backbone

__all__ = [
    "KINDS",
    "Batch",
    "Embeddings",
    "FullLower",
    "NgramLower",
    "SkipShape",
    "SkipStudent",
    "Teacher",
    "hashed_kept",
    "random_kept",
    "read_lower",
]

KINDS = ("trigram", "unigram", "window", "full")
_GATES = (0.12, 0.73, 0.12)  # how much of a token each view says at the start
_ONE_GATE = 0.97
_TYPICAL_LENGTH = 32  # positions over which the teacher's position embeddings are averaged
_CODE = (1 << 21) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipShape:
    """skipped: lower layers of the teacher that are replaced. lower: layers in their place. upper: layers of the
    teacher that stay above, counted from 0. window: tokens of the kind *window*."""

    kind: str
    skipped: int
    lower: int
    upper: tuple[int, ...]
    sinks: int = 2
    window: int = 5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind is {self.kind!r}; one of {', '.join(KINDS)} is known")
        if not self.upper or list(self.upper) != sorted(set(self.upper)):
            raise ConfigError(f"the upper layers are {self.upper}; give at least one, ascending")
        if self.lower < 0 or self.skipped < 1:
            raise ConfigError(f"{self.lower} layers in place of {self.skipped}; skip one layer at least")
        if self.kind == "window" and (self.lower != 1 or self.window % 2 == 0):
            raise ConfigError(f"a window of {self.window} with {self.lower} layers; give an odd window and one layer")


@dataclass(frozen=True, slots=True)
class Batch:
    """token_ids, type_ids: [B, n] int64. mask: [B, n] bool, True at real tokens, which come first."""

    token_ids: Tensor
    type_ids: Tensor
    mask: Tensor


# ---- the teacher, and lower ends -----------------------------------------------------------------------------------


class Embeddings(nn.Module):
    """Word, position and type embeddings and their LayerNorm. Words are not trained."""

    def __init__(self, config: EncoderConfig, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.word = nn.Parameter(weights["word_embeddings"], requires_grad=False)
        self.position = nn.Parameter(weights["position_embeddings"].clone())
        types = weights.get("type_embeddings")
        self.types = nn.Parameter(torch.zeros(1, config.hidden_size) if types is None else types.clone())
        self.norm = _norm(config, weights["emb_norm.weight"], weights["emb_norm.bias"])

    def forward(self, batch: Batch) -> Tensor:
        positions = torch.arange(batch.token_ids.shape[1], device=batch.token_ids.device)
        if self.config.position_offset:
            real = (batch.token_ids != self.config.pad_token_id).long()
            positions = real.cumsum(1) * real + self.config.pad_token_id
        types = self.types[batch.type_ids.clamp(max=len(self.types) - 1)]
        embedded: Tensor = self.norm(self.word[batch.token_ids] + self.position[positions] + types)
        return embedded


class Teacher(nn.Module):
    """The plain encoder, frozen."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        config, weights = backbone.config, backbone.weights
        if config.relative_buckets:
            raise ConfigError(f"a {config.model_type} encoder has relative positions, and no skip student")
        self.embeddings = Embeddings(config, weights)
        self.layers = nn.ModuleList(FullLayer(config, weights, i) for i in range(config.num_layers))
        self.requires_grad_(False)

    def forward(self, batch: Batch) -> list[Tensor]:
        """Hidden states [B, n, H]: of the embeddings, then after each layer."""
        bias = _attention_bias(batch.mask)
        states = [self.embeddings(batch)]
        for layer in self.layers:
            states.append(layer(states[-1], bias))
        return states


class FullLower(nn.Module):
    """The embeddings and the first layers of the teacher."""

    def __init__(self, backbone: Backbone, shape: SkipShape) -> None:
        super().__init__()
        self.embeddings = Embeddings(backbone.config, backbone.weights)
        self.layers = nn.ModuleList(FullLayer(backbone.config, backbone.weights, i) for i in range(shape.lower))

    def forward(self, batch: Batch, kept: Tensor | None) -> Tensor:
        bias = _attention_bias(batch.mask)
        hidden: Tensor = self.embeddings(batch)
        for layer in self.layers:
            hidden = layer(hidden, bias)
        return hidden


class _MergingLower(nn.Module):
    """What is local by nature gets its place in the text afterwards: gate, position, type, LayerNorm."""

    def __init__(self, backbone: Backbone, layers: Sequence[SinkBlock], slots: int) -> None:
        super().__init__()
        config, weights = backbone.config, backbone.weights
        self.word = nn.Parameter(weights["word_embeddings"], requires_grad=False)
        self.position_embeddings = nn.Parameter(_slot_positions(config, weights, slots))
        self.emb_norm = _norm(config, weights["emb_norm.weight"], weights["emb_norm.bias"])
        self.layers = nn.ModuleList(layers)
        self.gate_weight = nn.Parameter(torch.zeros(slots, config.hidden_size))
        self.gate_bias = nn.Parameter(torch.logit(torch.tensor(_GATES if slots == len(_GATES) else (_ONE_GATE,))))
        self.position = nn.Parameter(torch.zeros(config.max_length, config.hidden_size))
        self.types = nn.Parameter(torch.zeros(max(1, config.type_vocab_size), config.hidden_size))
        last = layers[-1].ffn_norm if layers else self.emb_norm
        self.norm = _norm(config, last.weight, last.bias)
        if layers:  # what scales the last local layer's rows comes after they are added up
            nn.init.ones_(last.weight)
            nn.init.zeros_(last.bias)

    def gated(self, rows: Tensor) -> Tensor:
        """[m, s, H]."""
        gates = torch.sigmoid((rows.float() * self.gate_weight).sum(-1) + self.gate_bias)
        return rows * gates[..., None].to(rows.dtype)

    def placed(self, merged: Tensor, batch: Batch) -> Tensor:
        """[B, n, H]."""
        places = torch.arange(merged.shape[1], device=merged.device)
        types = self.types[batch.type_ids.clamp(max=len(self.types) - 1)]
        placed: Tensor = self.norm(merged + self.position[places] + types)
        return placed


class NgramLower(_MergingLower):
    """Local layers on n-grams, and the sum of the views of each token."""

    def __init__(self, backbone: Backbone, shape: SkipShape, sinks: Tensor) -> None:
        self.slots = 3 if shape.kind == "trigram" else 1
        layers = [LocalLayer(backbone.config, backbone.weights, i, sinks[i]) for i in range(shape.lower)]
        super().__init__(backbone, layers, self.slots)

    def forward(self, batch: Batch, kept: Tensor | None) -> Tensor:
        """kept: [B, n], how many tokens of the n-gram around each are looked at: 3, 2 without the left one, 1, or 0."""
        grams, inverse = self.ngrams(batch, kept)
        rows = self.encode(grams)[inverse] * batch.mask[..., None, None]  # [B, n, s, H]
        if self.slots == 1:
            return self.placed(rows[:, :, 0], batch)
        merged = rows[:, :, 1].clone()
        merged[:, :-1] += rows[:, 1:, 0]
        merged[:, 1:] += rows[:, :-1, 2]
        return self.placed(merged, batch)

    def ngrams(self, batch: Batch, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distinct n-grams [m, s] of token ids, -1 where there is none, and [B, n] which is centred on each token."""
        ids = torch.where(batch.mask, batch.token_ids, -1) + 1
        if self.slots == 3:
            left, right = F.pad(ids, (1, 0))[:, :-1], F.pad(ids, (0, 1))[:, 1:]
            if kept is not None:
                left, right, ids = left * (kept > 2), right * (kept > 1), ids * (kept > 0)
            ids = (left << 42) | (ids << 21) | right
        ids = torch.where(batch.mask, ids, ids[0, 0])
        distinct, inverse = torch.unique(ids, return_inverse=True)
        shifts = (42, 21, 0) if self.slots == 3 else (0,)
        return torch.stack([((distinct >> shift) & _CODE) - 1 for shift in shifts], 1), inverse

    def encode(self, grams: Tensor) -> Tensor:
        """[m, s] token ids, -1 missing, to gated rows [m, s, H], 0 where the token is missing."""
        present = grams >= 0
        hidden = self.emb_norm(self.word[grams.clamp(min=0)] + self.position_embeddings)
        for layer in self.layers:
            hidden = layer(hidden, present)
        return self.gated(hidden) * present[..., None]


class WindowLower(_MergingLower):
    """One layer for the centre of a window."""

    def __init__(self, backbone: Backbone, shape: SkipShape, sinks: Tensor) -> None:
        layer = WindowLayer(backbone.config, backbone.weights, 0, sinks[0], shape.window)
        super().__init__(backbone, [layer], 1)

    def forward(self, batch: Batch, kept: Tensor | None) -> Tensor:
        distinct, inverse = torch.unique(batch.token_ids, return_inverse=True)
        rows = self.emb_norm(self.word[distinct] + self.position_embeddings[0])
        flat = self.gated(self.layers[0](rows, inverse, batch.mask)[:, None])[:, 0]
        merged = flat.new_zeros(*batch.mask.shape, flat.shape[-1])
        merged[batch.mask] = flat
        return self.placed(merged, batch)


class SkipStudent(nn.Module):
    """A lower end, and the upper layers that begin as the teacher's."""

    def __init__(self, backbone: Backbone, shape: SkipShape, sinks: Tensor) -> None:
        """sinks: [lower, S, H], teacher states that enter each layer, which stand for far tokens at the start."""
        super().__init__()
        if backbone.config.relative_buckets:
            raise ConfigError(f"a {backbone.config.model_type} encoder has relative positions, and no skip student")
        self.shape, self.config = shape, backbone.config
        self.lower: FullLower | NgramLower | WindowLower
        if shape.kind == "full":
            self.lower = FullLower(backbone, shape)
        else:
            self.lower = (WindowLower if shape.kind == "window" else NgramLower)(backbone, shape, sinks)
        self.upper = nn.ModuleList(FullLayer(backbone.config, backbone.weights, i) for i in shape.upper)

    @classmethod
    def of(cls, backbone: Backbone) -> SkipStudent:
        """As it was distilled. Raises ConfigError for a plain backbone."""
        lower, config = read_lower(backbone), backbone.config
        first = backbone.skip.config.first_layer if backbone.skip is not None else 0
        sinks = backbone.skip.config.sinks if backbone.skip is not None else 0
        kind, upper = "trigram" if lower.slots == 3 else "unigram", tuple(range(first, config.num_layers))
        shape = SkipShape(kind=kind, skipped=max(1, first), lower=0, upper=upper, sinks=sinks)
        student = cls(backbone, shape, torch.empty(0))
        student.shape = replace(shape, lower=len(lower.layers))
        student.lower = lower
        return student

    @property
    def words(self) -> Tensor:
        """[V, H] word embeddings, which are not trained."""
        return self.lower.embeddings.word if isinstance(self.lower, FullLower) else self.lower.word

    def forward(self, batch: Batch, kept: Tensor | None = None) -> list[Tensor]:
        """Hidden states [B, n, H]: what enters the upper layers, then after each. kept: see NgramLower."""
        bias = _attention_bias(batch.mask)
        states: list[Tensor] = [self.lower(batch, kept)]
        for layer in self.upper:
            states.append(layer(states[-1], bias))
        return states


def random_kept(shape: torch.Size, share: float, device: torch.device) -> Tensor:
    """[B, n] as a back-off leaves it: a `share` of the n-grams is shortened, a third of these to the token itself."""
    draw = torch.rand(shape, device=device)
    return 3 - (draw < share).long() - (draw < share / 3).long()


def _attention_bias(mask: Tensor) -> Tensor | None:
    """[B, 1, 1, n]: -inf at padding; None where there is none."""
    if bool(mask.all()):
        return None
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)[:, None, None]


def _norm(config: EncoderConfig, weight: Tensor, bias: Tensor) -> nn.LayerNorm:
    norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    norm.load_state_dict({"weight": weight, "bias": bias})
    return norm


def _slot_positions(config: EncoderConfig, weights: dict[str, Tensor], slots: int) -> Tensor:
    """[s, H]: what neighbouring places add on average in the teacher, the token type included."""
    table, first = weights["position_embeddings"], config.position_offset
    count = min(_TYPICAL_LENGTH, config.max_length - slots + 1)
    rows = torch.stack([table[first + k : first + k + count].mean(0) for k in range(slots)])
    types = weights.get("type_embeddings")
    return rows if types is None else rows + types[0]


def hashed_kept(batch: Batch, share: float) -> Tensor:
    """[B, n] as `random_kept`, but the same n-grams are shortened whenever they come, as by a table that lacks them."""
    ids = torch.where(batch.mask, batch.token_ids, -1) + 1
    left, right = F.pad(ids, (1, 0))[:, :-1], F.pad(ids, (0, 1))[:, 1:]
    mixed = (left * 0x9E3779B1 + ids * 0x85EBCA77 + right * 0xC2B2AE3D) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    draw = (mixed ^ (mixed >> 13)).double() / 2**32
    return 3 - (draw < share).long() - (draw < share / 3).long()


def read_lower(backbone: Backbone) -> NgramLower:
    """The lower end of a skip backbone as it was distilled. Raises ConfigError for a plain one."""
    if (skip := backbone.skip) is None:
        raise ConfigError(f"{backbone.folder} has no local layers, and so only the path plain")
    config, weights = skip.config, skip.weights
    shape = SkipShape(
        kind="trigram" if config.window == 3 else "unigram",
        skipped=max(1, config.first_layer),
        lower=0,
        upper=(0,),
    )
    lower = NgramLower(backbone, shape, torch.empty(0))
    slots = slice(0, 3) if config.window == 3 else slice(1, 2)
    for i in range(config.local_layers):
        own = {name.removeprefix(f"layers.{i}."): t for name, t in weights.items() if name.startswith(f"layers.{i}.")}
        lower.layers.append(LocalLayer(backbone.config, weights, i, torch.zeros(config.sinks, lower.position.shape[1])))
        lower.layers[-1].load_state_dict(own)
    lower.position_embeddings.data = weights["position_embeddings"][slots].clone()
    lower.gate_weight.data, lower.gate_bias.data = (
        weights["gate.weight"][slots].clone(),
        weights["gate.bias"][slots].clone(),
    )
    lower.position.data = weights["merge.position_embeddings"].clone()
    lower.types.data = weights["merge.type_embeddings"].clone()
    lower.emb_norm.load_state_dict({"weight": weights["emb_norm.weight"], "bias": weights["emb_norm.bias"]})
    lower.norm.load_state_dict({"weight": weights["merge.norm.weight"], "bias": weights["merge.norm.bias"]})
    return lower.requires_grad_(False).eval()
