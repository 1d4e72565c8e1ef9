"""How the deltas of one tenant lie in one flat slot: `SlotLayout`, and `pack`/`unpack` between deltas and slots.

A slot is laid out layer by layer, so that a layer can be ready before the next has arrived. Tenants with the same
layout (kind, layers, sites, ranks, activations) share an arena class; ranks are never padded to a larger one. This
module knows shapes and offsets, not devices, files or batches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vbert.config import ACTIVATIONS, EMBEDDING_LAYER, LINEAR_SITES, NORM_SITES, EncoderConfig
from vbert.errors import CorruptFile, ShapeError
from vbert.tenant import BOTTLENECK_SITES, Affine, Bottleneck, Delta, LowRank, Norm, OwnWeights, Sparse

__all__ = ["KINDS", "SlotEntry", "SlotLayout", "kind_of", "pack", "unpack"]

KINDS = ("low_rank", "bottleneck", "affine", "sparse", "weights")
_ALIGN = 16  # numbers: 64 bytes in float32, 32 in bfloat16
_PARTS: dict[str, tuple[str, ...]] = {
    "low_rank": ("a", "b"),
    "bottleneck": ("down", "down_bias", "up", "up_bias"),
    "affine": ("input_scale", "scale", "shift", "weight", "bias"),
    "sparse": ("values",),
    "weights": ("weight", "bias"),
}


@dataclass(frozen=True, slots=True)
class SlotEntry:
    """One tensor of a slot. `variant`: the activation of a bottleneck, else empty. `offset`: numbers from the start.

    A sparse entry has one part, `values` [nnz]; columns lie at the same offsets in an integer slot beside it.
    """

    layer: int
    site: str
    variant: str
    part: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """The layout of one kind. Entries ordered by layer, site, part; `numel` includes the padding after each entry."""

    kind: str
    entries: tuple[SlotEntry, ...]
    numel: int
    key: str = field(default="", compare=False)

    @classmethod
    def build(cls, kind: str, parts: Iterable[tuple[int, str, str, str, Sequence[int]]]) -> SlotLayout:
        """From (layer, site, variant, part, shape) tuples in any order."""
        order = {part: i for i, part in enumerate(_PARTS[kind])}
        offset, entries = 0, []
        for layer, site, variant, part, shape in sorted(parts, key=lambda p: (p[0], p[1], p[2], order[p[3]])):
            entry = SlotEntry(layer, site, variant, part, tuple(shape), offset)
            entries.append(entry)
            offset += -(-entry.numel // _ALIGN) * _ALIGN
        text = json.dumps([kind, [_entry_json(e) for e in entries]], separators=(",", ":"))
        return cls(kind, tuple(entries), offset, hashlib.sha256(text.encode()).hexdigest()[:16])

    def to_json(self) -> list[Any]:
        return [_entry_json(e) for e in self.entries]

    @classmethod
    def from_json(cls, kind: str, rows: Any) -> SlotLayout:
        """Raises CorruptFile when `rows` is not what `to_json` writes."""
        if kind not in _PARTS:
            raise CorruptFile(f"delta kind {kind!r} is unknown; this version reads {', '.join(KINDS)}")
        try:
            parts = tuple((int(i), str(s), str(v), str(p), tuple(map(int, shape))) for i, s, v, p, shape in rows)
        except (TypeError, ValueError) as error:
            raise CorruptFile(f"the {kind} layout is malformed ({error}); convert the tenant again") from error
        return _checked_layout(kind, parts)

    def sites(self) -> dict[tuple[int, str, str], dict[str, SlotEntry]]:
        """Entries by (layer, site, variant), then by part."""
        grouped: dict[tuple[int, str, str], dict[str, SlotEntry]] = {}
        for entry in self.entries:
            grouped.setdefault((entry.layer, entry.site, entry.variant), {})[entry.part] = entry
        return grouped

    def check(self, config: EncoderConfig) -> None:
        """Raise CorruptFile where a site does not exist in this backbone or has another width, or where whole weights
        are not whole."""
        if self.kind == "weights":
            self._check_whole(config)
            return
        taps: set[tuple[int, str]] = set()
        for (layer, site, variant), parts in self.sites().items():
            where = f"{self.kind} at layer {layer}, {site}"
            if not _site_exists(self.kind, layer, site, config):
                raise CorruptFile(f"{where}: the backbone has no such site; it has {config.num_layers} layers")
            shapes = {part: entry.shape for part, entry in parts.items()}
            if not _shapes_fit(self.kind, site, variant, shapes, config):
                raise CorruptFile(f"{where}: shapes {shapes} do not fit the backbone (hidden {config.hidden_size})")
            if self.kind == "bottleneck":
                if (layer, site.split(".")[0]) in taps:
                    raise CorruptFile(f"{where}: two bottlenecks around one sub-layer have no defined order")
                taps.add((layer, site.split(".")[0]))

    def _check_whole(self, config: EncoderConfig) -> None:
        here = {
            (layer, site): {p: e.shape for p, e in parts.items()} for (layer, site, _), parts in self.sites().items()
        }
        wanted = config.weight_shapes()
        for place in wanted.keys() | here.keys():
            if here.get(place) != wanted.get(place):
                layer, site = place
                raise CorruptFile(
                    f"weights at layer {layer}, {site}: shapes {here.get(place)}, the backbone's are "
                    f"{wanted.get(place)}; use the backbone that it was trained from"
                )


@lru_cache(maxsize=256)
def _checked_layout(kind: str, parts: tuple[tuple[int, str, str, str, tuple[int, ...]], ...]) -> SlotLayout:
    """Cached: tenants of one recipe have one layout, which is read at every load. Raises CorruptFile."""
    if any(p not in _PARTS[kind] or any(n < 1 for n in shape) for _, _, _, p, shape in parts):
        raise CorruptFile(f"the {kind} layout names a part or a size that does not exist; convert the tenant again")
    if len({p[:4] for p in parts}) != len(parts):
        raise CorruptFile(f"the {kind} layout names a part twice; convert the tenant again")
    return SlotLayout.build(kind, parts)


def kind_of(delta: Delta) -> str:
    match delta:
        case LowRank():
            return "low_rank"
        case Bottleneck():
            return "bottleneck"
        case Sparse():
            return "sparse"
        case Affine() | Norm():
            return "affine"
        case OwnWeights():
            return "weights"


def pack(deltas: Sequence[Delta]) -> dict[str, tuple[SlotLayout, Tensor]]:
    """Group deltas by kind into flat float32 slots: kind -> (layout, data [numel]).

    Raises ShapeError where two deltas claim one place: one of them would be lost.
    """
    packed: dict[str, tuple[SlotLayout, Tensor]] = {}
    for kind in KINDS:
        tensors: dict[tuple[int, str, str, str], Tensor] = {}
        for d in deltas:
            for part, tensor in _tensors(d).items() if kind_of(d) == kind else ():
                if (place := (d.layer, d.site, _variant(d), part)) in tensors:
                    raise ShapeError(f"two {kind} deltas at layer {d.layer}, {d.site} give {part!r}; merge them first")
                tensors[place] = tensor
        if not tensors:
            continue
        layout = SlotLayout.build(kind, [(*key, tuple(t.shape)) for key, t in tensors.items()])
        data = torch.zeros(layout.numel, dtype=torch.float32)
        for e in layout.entries:
            value = tensors[e.layer, e.site, e.variant, e.part]
            data[e.offset : e.offset + e.numel] = value.detach().to(torch.float32).reshape(-1)
        packed[kind] = (layout, data)
    return packed


def unpack(
    layout: SlotLayout, data: Tensor, indices: Tensor | None = None, row_starts: Tensor | None = None
) -> list[Delta]:
    """The deltas of one kind, views of `data` [numel]. Sparse: `indices` [numel] and `row_starts`, as in the file."""
    deltas: list[Delta] = []
    cursor = 0
    for (layer, site, variant), parts in layout.sites().items():
        views = {name: data[e.offset : e.offset + e.numel].view(e.shape) for name, e in parts.items()}
        if layout.kind == "low_rank":
            deltas.append(LowRank(layer=layer, site=site, **views))
        elif layout.kind == "bottleneck":
            deltas.append(Bottleneck(layer=layer, site=site, activation=variant, **views))
        elif layout.kind == "affine":
            deltas.append((Norm if site in NORM_SITES else Affine)(layer=layer, site=site, **views))
        elif layout.kind == "weights":
            deltas.append(OwnWeights(layer=layer, site=site, **views))
        else:
            assert indices is not None
            assert row_starts is not None
            e = parts["values"]
            # the starts of one site end where they reach its nnz; the file stores them one site after the other
            count = int(variant) + 1
            starts = row_starts[cursor : cursor + count]
            cursor += count
            columns = indices[e.offset : e.offset + e.numel]
            deltas.append(Sparse(layer=layer, site=site, row_starts=starts, columns=columns, values=views["values"]))
    return deltas


def _variant(delta: Delta) -> str:
    if isinstance(delta, Bottleneck):
        return delta.activation
    if isinstance(delta, Sparse):
        return str(delta.row_starts.numel() - 1)  # rows: the width that leaves the site
    return ""


def _tensors(delta: Delta) -> dict[str, Tensor]:
    """The float tensors of a delta by part name; an empty sparse delta keeps one zero so that every site has a size."""
    if isinstance(delta, Sparse):
        return {"values": delta.values if delta.values.numel() else torch.zeros(1)}
    named = {part: getattr(delta, part, None) for part in _PARTS[kind_of(delta)]}
    return {part: tensor for part, tensor in named.items() if tensor is not None}


def _entry_json(e: SlotEntry) -> list[Any]:
    return [e.layer, e.site, e.variant, e.part, list(e.shape)]


def _site_exists(kind: str, layer: int, site: str, config: EncoderConfig) -> bool:
    if kind == "affine" and site == "emb_norm":
        return layer == EMBEDDING_LAYER
    if not 0 <= layer < config.num_layers:
        return False
    if kind == "bottleneck":
        return site in BOTTLENECK_SITES
    return site in LINEAR_SITES or (kind == "affine" and site in NORM_SITES)


def _shapes_fit(kind: str, site: str, variant: str, shapes: dict[str, tuple[int, ...]], config: EncoderConfig) -> bool:
    hidden = config.hidden_size
    if kind == "low_rank":
        rank = shapes.get("a", (0, 0))[-1]
        return shapes == {"a": (config.site_in(site), rank), "b": (rank, config.site_out(site))}
    if kind == "bottleneck":
        rank = shapes.get("down", (0, 0))[-1]
        wanted = {"down": (hidden, rank), "down_bias": (rank,), "up": (rank, hidden), "up_bias": (hidden,)}
        return variant in ACTIVATIONS and shapes == wanted
    if kind == "sparse":
        return variant == str(config.site_out(site)) and set(shapes) == {"values"} and len(shapes["values"]) == 1
    if site in NORM_SITES:
        return shapes == {"weight": (hidden,), "bias": (hidden,)}
    if "input_scale" in shapes and site in ("q", "k", "v"):
        return False
    widths = {"input_scale": config.site_in(site), "scale": config.site_out(site), "shift": config.site_out(site)}
    return bool(shapes) and all(part in widths and shape == (widths[part],) for part, shape in shapes.items())
