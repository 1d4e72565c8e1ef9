"""Encoder + deltas + heads as one plain synchronous `forward`: the oracle every pipeline must match."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from vbert.config import EMBEDDING_LAYER
from vbert.encoder import Encoder
from vbert.errors import KernelUnavailable, ShapeError
from vbert.exits import Left, leave, rows_of, staying
from vbert.feed import Feed
from vbert.formats.transformers_folder import Backbone
from vbert.graphs import HiddenGraphs, capture_on_cuda
from vbert.heads import run_heads
from vbert.kernels.cuda import check_available, cupy_is_installed
from vbert.local_layers import LocalLayers
from vbert.packing import PackedBatch, SequenceInput, Ways, own_ways, pack_joined
from vbert.rows import RowSource
from vbert.side_streams import SideStreams
from vbert.stream_counts import stream_counts
from vbert.tenant import Dense
from vbert.workspace import Workspace

__all__ = ["Model", "PackedBatch", "SequenceInput", "resolve_device", "resolve_dtype"]

_log = logging.getLogger(__name__)


class Model:
    """A frozen backbone ready to compute. Holds no tenants: a batch brings its own."""

    def __init__(
        self,
        backbone: Backbone,
        dtype: torch.dtype,
        device: torch.device,
        words: RowSource | None = None,
        *,
        graphs: bool = False,
        operator_streams: int = 0,
    ) -> None:
        """words: the word embeddings where they are not to be kept in memory. graphs: on a GPU, replay CUDA graphs of
        batches that come often. operator_streams: of a GPU, for operators of different arena classes; 0: as many as the
        feed says, without one 1, in a graph what is fastest. Raises ShapeError if the words do not fit."""
        if words is not None and (words.dtype, words.width) != (dtype, backbone.config.hidden_size):
            raise ShapeError(
                f"the word rows are {words.width} numbers of {words.dtype}, the model's are "
                f"{backbone.config.hidden_size} of {dtype}; make the table again"
            )
        self.config, self.embed_head = backbone.config, backbone.embed_head
        self.fingerprint, self.dtype, self.device = backbone.fingerprint, dtype, device
        self.encoder = Encoder(backbone.config, backbone.weights, dtype, device, words)
        self._every_space: list[weakref.ref[Workspace]] = []
        self._spaces: list[Workspace] = []  # those no forward uses now
        fits = graphs and words is None and self.encoder.takes_varlen
        self._operator_streams = operator_streams if device.type == "cuda" else 1
        self._side_streams = SideStreams(device)
        new = HiddenGraphs(self._layers, self._new_space, capture_on_cuda, self._counts_for_graph)
        self._graphs = new if fits else None
        self.local = None if backbone.skip is None else LocalLayers(self.encoder, backbone.skip)
        weights = backbone.weights
        self._pooler = (
            Dense(weight=weights["pooler.weight"].to(device), bias=weights["pooler.bias"].to(device), activation="tanh")
            if backbone.config.has_pooler
            else None
        )

    @classmethod
    def load(
        cls,
        backbone: Backbone,
        dtype: str = "auto",
        device: str = "auto",
        words: RowSource | None = None,
        *,
        graphs: bool = False,
        operator_streams: int = 0,
    ) -> Model:
        """dtype, device: as in EngineConfig. Raises KernelUnavailable for a device that has no operators."""
        resolved = resolve_device(device)
        where = resolve_dtype(dtype, resolved), resolved
        return cls(backbone, *where, words, graphs=graphs, operator_streams=operator_streams)

    @property
    def activation_bytes(self) -> int:
        """Of the buffers kept for forwards."""
        return sum(space.num_bytes for ref in tuple(self._every_space) if (space := ref()) is not None)

    def free_memory(self) -> None:
        """Let go of what is kept for the next forward, after one that found no room."""
        self._spaces.clear()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # before graphs go that may still run
            if self._graphs is not None:
                self._graphs.clear()
            torch.cuda.empty_cache()

    def pack(self, sequences: Sequence[SequenceInput]) -> PackedBatch:
        """Each by its first path, or plain where it may. Raises ShapeError for a path that there is not."""
        ways = None if self.local is None else own_ways(sequences, self.local.config)
        if ways is not None:
            return self.pack_joined(sequences, ways)
        if self.local is None and any("plain" not in s.paths for s in sequences):
            raise ShapeError("a sequence is to skip layers, and the backbone has no skip part")
        return PackedBatch.build(sequences, self.config, self.embed_head)

    def pack_joined(self, sequences: Sequence[SequenceInput], ways: Ways) -> PackedBatch:
        return pack_joined(sequences, self.config, self.embed_head, ways)

    @torch.inference_mode()
    def hidden(self, batch: PackedBatch, feed: Feed | None = None) -> Tensor:
        """Last hidden states in packed order, [T, H], of those that do not leave early. Any number of threads may call
        it; on a GPU, of one stream."""
        return self._to_the_end(batch, feed or _Nothing(), {})[0]

    def _to_the_end(self, batch: PackedBatch, feed: Feed, left: Left) -> tuple[Tensor, PackedBatch | None]:
        """Last hidden states, and the batch of those that came so far; `left` gets the others."""
        whole = batch.whole
        encoder = self.encoder if whole is None else Encoder.of_tenant(self.config, whole)
        word_rows = feed.word_rows() if whole is None else None
        everything = partial(self._wait_for_all, feed)
        plain = word_rows is None and batch.junction is None and not batch.exits and whole is None
        if self._graphs is not None and plain and (graph := self._graphs.find(batch, everything)):
            everything()  # a graph cannot wait inside
            return graph.run(batch), batch
        if word_rows is None and batch.entering is not None:
            word_rows = encoder.mapped_words(batch.entering.rows)
        elif word_rows is not None and word_rows.is_cuda:
            word_rows.record_stream(torch.cuda.current_stream(self.device))  # made on another
        try:
            space = self._spaces.pop()
        except IndexError:
            space = self._new_space()
        try:
            moved = self._moved(batch, self._num_streams(batch, feed))
            return self._all_layers(encoder, moved, space, feed, word_rows, left)
        finally:
            self._spaces.append(space)

    def _wait_for_all(self, feed: Feed) -> None:
        for i in range(EMBEDDING_LAYER, self.config.num_layers):
            feed.before_layer(i)

    def forward(self, batch: PackedBatch, feed: Feed | None = None) -> list[Tensor]:
        """The raw answer of each sequence, in the order they were given to `pack`: float32, see vbert/heads.py."""
        return self.launch(batch, feed)()

    @torch.inference_mode()
    def launch(self, batch: PackedBatch, feed: Feed | None = None) -> Callable[[], list[Tensor]]:
        """Begin a forward on this thread's stream; what it returns waits for the end and gives what `forward` gives."""
        feed, left = feed or _Nothing(), Left()
        hidden, rest = self._to_the_end(batch, feed, left)
        feed.before_layer(self.config.num_layers)
        answers = {place: answer for place, (_, answer) in left.items()}
        if rest is not None:
            packed = run_heads(hidden, rest.rows.cu_seqlens, rest.heads, self._pooler)
            answers |= dict(zip(rest.order, packed, strict=True))
        if batch.exits:
            feed.exited([left[i][0] if i in left else 0 for i in range(len(answers))])
        return _to_host([answers[i] for i in range(len(answers))])

    def _new_space(self) -> Workspace:
        space = Workspace(self.dtype, self.device)
        self._every_space = [*(ref for ref in self._every_space if ref() is not None), weakref.ref(space)]
        return space

    def _moved(self, batch: PackedBatch, num_streams: int) -> PackedBatch:
        return self._dealt(batch.on(self.device, buckets=not self.encoder.takes_varlen), num_streams)

    def _dealt(self, batch: PackedBatch, num_streams: int) -> PackedBatch:
        return batch if num_streams == 1 else batch.side_by_side(num_streams, self._side_streams)

    def _num_streams(self, batch: PackedBatch, feed: Feed) -> int:
        """For the operators of a batch that no graph computes."""
        if self._operator_streams == 1 or (groups := batch.deltas.num_groups) < 2:
            return 1
        return self._operator_streams or feed.operator_streams(groups)

    def _counts_for_graph(self, batch: PackedBatch) -> Sequence[int]:
        """Numbers of streams to capture a batch with, of which the fastest is kept."""
        groups = max(1, batch.deltas.num_groups)
        return (min(self._operator_streams, groups),) if self._operator_streams else stream_counts(groups)

    def _layers(self, batch: PackedBatch, space: Workspace, num_streams: int = 1) -> Tensor:
        """All layers of a batch whose tensors are on the model's device, and which nobody leaves."""
        return self._all_layers(self.encoder, self._dealt(batch, num_streams), space, _Nothing(), None, {})[0]

    def _all_layers(
        self,
        encoder: Encoder,
        batch: PackedBatch,
        space: Workspace,
        feed: Feed,
        word_rows: Tensor | None,
        left: Left,
    ) -> tuple[Tensor, PackedBatch | None]:
        num_layers = self.config.num_layers
        if (junction := batch.junction) is None:
            hidden = _embedded(encoder, batch, feed, word_rows)
            return self._upwards(encoder, range(num_layers), batch, hidden, space, feed, left)
        parts: list[Tensor] = []
        if (lower := junction.lower) is not None:
            hidden = _embedded(encoder, lower, feed, word_rows)
            # whoever leaves here stays in the batch until the junction: others may want its states
            places = lower.order if junction.source is None else [junction.computed[k] for k in lower.order]
            attention = encoder.attention(lower.rows)
            for i in range(junction.layer):
                if i in lower.exits:
                    leave(i, hidden, lower, places, left)
                feed.before_layer(i)
                hidden = encoder.layer(i, hidden, attention, lower.deltas, space)
            parts.append(hidden)
            if len(junction.kept):
                feed.keep(parts[0].index_select(0, junction.kept))
        if junction.num_given:
            parts.append(feed.given_rows())
        if junction.entry is not None:
            assert self.local is not None
            entered, computed = self.local.enter(junction.entry, feed.entry_rows(), space)
            parts.append(entered)
            if len(computed):
                feed.keep_ngrams(computed)
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        if junction.source is not None:
            hidden = hidden.index_select(0, junction.source)
        return self._upwards(encoder, range(junction.layer, num_layers), batch, hidden, space, feed, left)

    def _upwards(
        self,
        encoder: Encoder,
        layers: range,
        batch: PackedBatch,
        hidden: Tensor,
        space: Workspace,
        feed: Feed,
        left: Left,
    ) -> tuple[Tensor, PackedBatch | None]:
        """To the last layer, with those that do not leave on the way."""
        attention = encoder.attention(batch.rows)
        gone = 0  # of `left`, those that are no longer in the batch
        for i in layers:
            if i in batch.exits:
                leave(i, hidden, batch, batch.order, left)
            if len(left) > gone:
                if not (rest := staying(batch, left)):
                    return hidden[:0], None
                gone = len(left)
                hidden = hidden.index_select(0, rows_of(batch, rest).to(hidden.device))
                fewer = batch.only(rest, self.config, self.embed_head)
                batch = self._moved(fewer, batch.deltas.num_streams)
                attention = encoder.attention(batch.rows)
            feed.before_layer(i)
            hidden = encoder.layer(i, hidden, attention, batch.deltas, space)
        return hidden, batch


def _embedded(encoder: Encoder, batch: PackedBatch, feed: Feed, word_rows: Tensor | None) -> Tensor:
    feed.before_layer(EMBEDDING_LAYER)
    return encoder.embed(batch.rows, batch.deltas, word_rows)


class _Nothing:
    """The feed of a forward that has everything."""

    def word_rows(self) -> None:
        return None

    def given_rows(self) -> Tensor:
        raise ShapeError("a batch with a junction needs a feed that gives its states")

    def keep(self, rows: Tensor) -> None:
        pass

    def entry_rows(self) -> None:
        return None

    def keep_ngrams(self, rows: Tensor) -> None:
        pass

    def exited(self, layers: Sequence[int]) -> None:
        pass

    def before_layer(self, i: int) -> None:
        pass

    def operator_streams(self, groups: int) -> int:
        return 1


def _to_host(answers: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Begin to copy answers to host memory, all in one; what it returns waits for them."""
    if not answers[0].is_cuda:
        return lambda: answers
    flat = torch.cat([answer.reshape(-1) for answer in answers])
    host = torch.empty(len(flat), dtype=flat.dtype, pin_memory=True)
    host.copy_(flat, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    arrived.record()

    def wait() -> list[Tensor]:
        arrived.synchronize()
        pieces = torch.split(host.clone(), [answer.numel() for answer in answers])  # pinned is not for keeping
        return [piece.view(answer.shape) for piece, answer in zip(pieces, answers, strict=True)]

    return wait


def resolve_device(device: str) -> torch.device:
    """auto: cuda where torch sees a GPU and cupy is installed, else cpu. Raises KernelUnavailable for cuda else."""
    if device == "auto" and torch.cuda.is_available():
        if cupy_is_installed():
            device = "cuda"
        else:
            _log.warning("device auto is cpu although there is a GPU: cupy is missing; install vbert[cuda13]")
    if device != "cuda":
        return torch.device("cpu")
    check_available()
    return torch.device("cuda", torch.cuda.current_device())


def resolve_dtype(dtype: str, device: torch.device | None = None) -> torch.dtype:
    """auto: bfloat16 on a GPU, and where the CPU multiplies it natively (AMX or AVX512-BF16), else float32.

    Raises KernelUnavailable for float16 on a CPU.
    """
    on_gpu = device is not None and device.type == "cuda"
    if dtype == "auto":
        native = on_gpu or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    if dtype == "float16" and not on_gpu:
        raise KernelUnavailable("dtype 'float16' is computed on a GPU only; use float32 or bfloat16, or device='cuda'")
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
