"""The lower end of a skip backbone: n-grams to rows, and added-up rows to what enters the upper layers.

An n-gram (a, b, c) goes alone through a few transformer layers; besides its own slots each layer attends to some
constant keys and values ("sinks") that stand for the rest of a text. What comes out, u [3, H], is scaled by a gate,

    u_s <- u_s * sigmoid(w_s . u_s + b_s),    0 where the slot is empty,

and depends on three ids only, so it can be stored. A token is what the n-grams around it say of it, added up, with its
position and type, normalised: z_i = LayerNorm(u_i[1] + u_{i+1}[0] + u_{i-1}[2] + P[i] + T[type_i]).

Source: Wang et al. 2022, SkipBERT (ACL); the sinks, a gate for each slot and masked empty slots are ours.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vbert.batch import AttentionPlan, PackedRows
from vbert.config import EncoderConfig
from vbert.deltas import BatchDeltas
from vbert.encoder import Encoder
from vbert.entry import Entry
from vbert.kernels.merge_rows import merge_rows
from vbert.kernels.slot_attention import slot_attention
from vbert.ngram.index import Keys, parts_of
from vbert.ngram.views import add_views
from vbert.skip import SLOTS, Skip
from vbert.workspace import Workspace

__all__ = ["LocalLayers"]

_AT_ONCE = 4096  # n-grams in one forward


class LocalLayers:
    """In one dtype on one device. Any number of threads may call it, each with buffers of its own."""

    def __init__(self, encoder: Encoder, skip: Skip) -> None:
        """encoder: the one above, whose word embeddings these layers read."""
        self.config, self.fingerprint, self.base = skip.config, skip.fingerprint, skip.base
        self._dtype, self._device, self._words = encoder.dtype, encoder.device, encoder
        dtype, device, weights, shape = encoder.dtype, encoder.device, skip.weights, encoder.config
        local = _local_config(shape, skip.config.local_layers)
        nothing = {"word_embeddings": torch.zeros(1, shape.hidden_size)}
        self._encoder = Encoder(local, weights | nothing, dtype, device)
        self._num_heads = shape.num_heads

        def get(name: str, dtype: torch.dtype = dtype) -> Tensor:
            return weights[name].to(device=device, dtype=dtype)

        self._sinks = [
            (get(f"layers.{i}.sink_keys", torch.float32), get(f"layers.{i}.sink_values", torch.float32))
            for i in range(skip.config.local_layers)
        ]
        self._gate_weight, self._gate_bias = get("gate.weight", torch.float32), get("gate.bias", torch.float32)
        self._position, self._type = get("merge.position_embeddings"), get("merge.type_embeddings")
        self._norm = get("merge.norm.weight"), get("merge.norm.bias")
        self._eps, self.width = shape.layer_norm_eps, shape.hidden_size
        self._deltas = BatchDeltas([None], [0, 0])

    @property
    def num_bytes(self) -> int:
        """Of all weights; the word embeddings are the encoder's."""
        own = [self._position, self._type, *self._norm, *(sink for pair in self._sinks for sink in pair)]
        return self._encoder.num_bytes + sum(tensor.nbytes for tensor in own)

    @torch.inference_mode()
    def encode(self, keys: Keys, space: Workspace | None = None) -> Tensor:
        """[n] n-grams (vbert/ngram/index.py) to their rows, [n, 3, H] on the device. space: buffers to use."""
        space = space or Workspace(self._dtype, self._device)
        parts = [self._encode(keys[i : i + _AT_ONCE], space) for i in range(0, len(keys), _AT_ONCE)]
        if not parts:
            return torch.empty(0, SLOTS, self.width, dtype=self._dtype, device=self._device)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.inference_mode()
    def enter(self, entry: Entry, rows: Tensor | None = None, space: Workspace | None = None) -> tuple[Tensor, Tensor]:
        """What enters the upper layers, [T, H] of the model's dtype, and the rows of `entry.missing`, [m, 3, H].

        rows: [T, H] float32, `entry.rows` on the device, overwritten; None: those that `entry` has.
        """
        rows = entry.rows if rows is None else rows
        computed = self.encode(entry.missing, space)
        merged = self._added(entry, computed, rows) if len(computed) else rows
        if merged is None:
            merged = torch.zeros(len(entry.tokens), self.width, device=self._device)
        position_ids, type_ids = (ids.to(self._device, non_blocking=True) for ids in entry.seen())
        hidden = merged + F.embedding(position_ids, self._position) + F.embedding(type_ids, self._type)
        return F.layer_norm(hidden.to(self._dtype), (self.width,), *self._norm, self._eps), computed

    def _added(self, entry: Entry, computed: Tensor, rows: Tensor | None) -> Tensor:
        """[T, H] float32: `rows` and what the computed n-grams say."""
        cu_seqlens, total = entry.tokens.cu_seqlens, len(entry.tokens)
        if self._device.type == "cpu":
            out = torch.zeros(total, self.width) if rows is None else rows
            return add_views(computed, entry.which, cu_seqlens, out=out)
        which = torch.from_numpy(entry.which).to(self._device)
        views = computed.index_select(0, which.clamp(min=0)) * (which >= 0)[:, None, None]
        merged = torch.empty(total, self.width, device=self._device)
        merge_rows(views, torch.from_numpy(cu_seqlens.astype(np.int32)).to(self._device), out=merged)
        return merged if rows is None else rows.add_(merged)

    def _attend(self, present: Tensor, sinks: tuple[Tensor, Tensor], space: Workspace, qkv: Tensor) -> Tensor:
        context = space.rows("context", len(qkv), self.width)
        return slot_attention(qkv, *sinks, present, self._num_heads, out=context)

    def _encode(self, keys: Keys, space: Workspace) -> Tensor:
        ids = torch.from_numpy(parts_of(keys))
        present = (ids >= 0).to(self._device)
        rows = _slots(ids.clamp(min=0), self._device)
        hidden = self._encoder.embed(rows, self._deltas, self._words.word_rows(rows))
        for i, sinks in enumerate(self._sinks):
            attend = partial(self._attend, present, sinks, space)
            hidden = self._encoder.layer(i, hidden, attend, self._deltas, space)
        u = hidden.view(len(ids), SLOTS, self.width)
        gate = torch.sigmoid((u.float() * self._gate_weight).sum(-1) + self._gate_bias) * present
        return u * gate.unsqueeze(-1).to(u.dtype)


def _slots(ids: Tensor, device: torch.device) -> PackedRows:
    """The slots of n-grams as rows; their position is the slot, on a device. ids: [m, 3], in host memory."""
    position_ids = torch.arange(SLOTS, device=device).repeat(len(ids))
    flat = ids.reshape(-1)
    return PackedRows(
        token_ids=flat,
        type_ids=torch.zeros_like(flat),
        position_ids=position_ids,
        cu_seqlens=np.arange(0, len(flat) + 1, SLOTS),
        longest=SLOTS,
        attention=AttentionPlan((), None, None),
    )


def _local_config(encoder: EncoderConfig, layers: int) -> EncoderConfig:
    """Of an encoder of so many layers over slots: no types, no offset of positions."""
    return replace(encoder, num_layers=layers, type_vocab_size=0, position_offset=0, max_length=SLOTS, has_pooler=False)
