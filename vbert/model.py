"""Encoder + deltas + heads as one plain synchronous `forward`: the oracle every pipeline must match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vbert.arena import ResidentTenant
from vbert.batch import PackedRows
from vbert.config import EMBEDDING_LAYER, EncoderConfig
from vbert.deltas import BatchDeltas
from vbert.encoder import Encoder
from vbert.errors import KernelUnavailable, ShapeError
from vbert.feed import Feed
from vbert.formats.transformers_folder import Backbone
from vbert.heads import run_heads
from vbert.rows import RowSource
from vbert.tenant import Dense, Head
from vbert.workspace import Workspace

__all__ = ["Model", "PackedBatch", "SequenceInput", "resolve_device", "resolve_dtype"]


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """One tokenised sequence and who it is for; tenant None: the bare backbone with its own embedding head."""

    token_ids: Sequence[int]
    type_ids: Sequence[int]
    tenant: ResidentTenant | None = None


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences packed so that the rows of one tenant, and of one arena class where possible, are contiguous.

    order[j]: which of the given sequences lies at packed position j. heads: [B], in packed order.
    """

    rows: PackedRows
    deltas: BatchDeltas
    heads: tuple[Head, ...]
    order: tuple[int, ...]
    tenants: tuple[ResidentTenant, ...]  # distinct

    @classmethod
    def build(cls, sequences: Sequence[SequenceInput], config: EncoderConfig, embed_head: Head) -> PackedBatch:
        """Pack at least one sequence; each has between 1 and config.max_length tokens."""
        order = sorted(range(len(sequences)), key=lambda i: _packing_key(sequences[i].tenant))
        packed = [sequences[i] for i in order]
        rows = PackedRows.build([s.token_ids for s in packed], [s.type_ids for s in packed], config)
        firsts = [j for j, s in enumerate(packed) if j == 0 or s.tenant is not packed[j - 1].tenant]
        tenants = [packed[j].tenant for j in firsts]
        starts = [int(rows.cu_seqlens[j]) for j in (*firsts, len(packed))]
        return cls(
            rows=rows,
            deltas=BatchDeltas(tenants, starts),
            heads=tuple(s.tenant.head if s.tenant else embed_head for s in packed),
            order=tuple(order),
            tenants=tuple(t for t in tenants if t is not None),
        )


class Model:
    """A frozen backbone ready to compute. Holds no tenants: a batch brings its own."""

    def __init__(
        self, backbone: Backbone, dtype: torch.dtype, device: torch.device, words: RowSource | None = None
    ) -> None:
        """words: the word embeddings where they are not to be kept in memory. Raises ShapeError if they do not fit."""
        if words is not None and (words.dtype, words.width) != (dtype, backbone.config.hidden_size):
            raise ShapeError(
                f"the word rows are {words.width} numbers of {words.dtype}, the model's are "
                f"{backbone.config.hidden_size} of {dtype}; make the table again"
            )
        self.config, self.embed_head = backbone.config, backbone.embed_head
        self.fingerprint, self.dtype, self.device = backbone.fingerprint, dtype, device
        self.encoder = Encoder(backbone.config, backbone.weights, dtype, device, words)
        self._spaces: list[Workspace] = []  # those no forward uses now
        weights = backbone.weights
        self._pooler = (
            Dense(weight=weights["pooler.weight"], bias=weights["pooler.bias"], activation="tanh")
            if backbone.config.has_pooler
            else None
        )

    @classmethod
    def load(
        cls, backbone: Backbone, dtype: str = "auto", device: str = "auto", words: RowSource | None = None
    ) -> Model:
        """dtype, device: as in EngineConfig. Raises KernelUnavailable for a device that has no operators."""
        resolved = resolve_device(device)
        return cls(backbone, resolve_dtype(dtype), resolved, words)

    def free_memory(self) -> None:
        """Let go of what is kept for the next forward, after one that found no room."""
        self._spaces.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def pack(self, sequences: Sequence[SequenceInput]) -> PackedBatch:
        return PackedBatch.build(sequences, self.config, self.embed_head)

    @torch.inference_mode()
    def hidden(self, batch: PackedBatch, feed: Feed | None = None) -> Tensor:
        """Last hidden states in packed order, [T, H]. Any number of threads may call it."""
        feed = feed or _Nothing()
        try:
            space = self._spaces.pop()
        except IndexError:
            space = Workspace(self.dtype, self.device)
        attention = self.encoder.attention(batch.rows)
        feed.before_layer(EMBEDDING_LAYER)
        hidden = self.encoder.embed(batch.rows, batch.deltas, feed.word_rows())
        for i in range(self.config.num_layers):
            feed.before_layer(i)
            hidden = self.encoder.layer(i, hidden, attention, batch.deltas, space)
        self._spaces.append(space)
        return hidden

    def forward(self, batch: PackedBatch, feed: Feed | None = None) -> list[Tensor]:
        """The raw answer of each sequence, in the order they were given to `pack`: float32, see vbert/heads.py."""
        return self.launch(batch, feed)()

    @torch.inference_mode()
    def launch(self, batch: PackedBatch, feed: Feed | None = None) -> Callable[[], list[Tensor]]:
        """Begin a forward on this thread's stream; what it returns waits for the end and gives what `forward` gives."""
        feed = feed or _Nothing()
        hidden = self.hidden(batch, feed)
        feed.before_layer(self.config.num_layers)
        packed = run_heads(hidden, batch.rows.cu_seqlens, batch.heads, self._pooler)
        return partial(_in_order_given, packed, batch.order)


class _Nothing:
    """The feed of a forward that has everything."""

    def word_rows(self) -> None:
        return None

    def before_layer(self, i: int) -> None:
        pass


def _in_order_given(packed: Sequence[Tensor], order: Sequence[int]) -> list[Tensor]:
    answers: list[Tensor] = [packed[0]] * len(packed)
    for j, i in enumerate(order):
        answers[i] = packed[j]
    return answers


def resolve_device(device: str) -> torch.device:
    """auto is cpu: the GPU lanes do not exist yet, and saying so beats a slow path that looks like one."""
    if device == "cuda":
        raise KernelUnavailable("device 'cuda' has no operators in this version; use device='cpu' or 'auto'")
    return torch.device("cpu")


def resolve_dtype(dtype: str) -> torch.dtype:
    """auto: bfloat16 where the CPU multiplies it natively (AMX or AVX512-BF16), else float32."""
    if dtype == "auto":
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def _packing_key(tenant: ResidentTenant | None) -> tuple[str, str]:
    """Tenants of the same classes lie side by side, so that their operators read one contiguous range of rows."""
    if tenant is None:
        return "", ""
    return " ".join(sorted(c.layout.key for c, _ in tenant.slots)), tenant.digest
