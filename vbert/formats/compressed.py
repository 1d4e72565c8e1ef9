"""A fully fine-tuned `transformers` folder as a tenant of the backbone it came from: what training changed, made small.

Biases, LayerNorms and the head are kept as they are. The change of each linear's weight becomes a sparse delta where
few weights changed, else a low-rank one of the smallest rank that leaves no more than a given part of it, or, without
ranks, its largest numbers. Embeddings stay the backbone's, for which there is no delta; how much is lost is told, and
has to be looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vbert.config import EMBEDDING_LAYER, LINEAR_SITES, NORM_SITES
from vbert.errors import RefusedCheckpoint
from vbert.formats.native import bias_to_affine, diff_to_sparse
from vbert.formats.tensors import malformed_is_corrupt
from vbert.formats.transformers_folder import Backbone
from vbert.formats.transformers_head import read_whole_model
from vbert.tenant import Delta, LowRank, Norm, TenantModule

__all__ = ["Compressed", "Compression", "WeightLoss", "compress_folder", "worst"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """max_rank: of a low-rank delta; 0: there are none. max_error: part of a weight's change (by Frobenius norm) that
    may be lost where max_rank allows it. max_density: part of the weights that may have changed for a sparse delta,
    which loses none; without low-rank ones, the part of them whose changes are kept."""

    max_rank: int = 64
    max_error: float = 0.05
    max_density: float = 0.05

    def __post_init__(self) -> None:
        """Raises RefusedCheckpoint."""
        if self.max_rank < 0 or not 0 <= self.max_error < 1 or not 0 <= self.max_density <= 1:
            raise RefusedCheckpoint(
                f"rank {self.max_rank}, error {self.max_error}, density {self.max_density}: give a rank of at least 0, "
                "an error from 0 to below 1 and a density from 0 to 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightLoss:
    """One changed weight. kind: `low_rank`, `sparse`, or `dropped`. size: its rank, or how many weights changed.
    change: of the weight, by its norm; error: part of that change that is lost."""

    weight: str
    kind: str
    size: int
    change: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """module: the tenant. original: the whole model's encoder."""

    module: TenantModule
    original: Backbone
    losses: tuple[WeightLoss, ...]

    @property
    def whole(self) -> TenantModule:
        """The head alone, which on the original encoder is the whole model."""
        return replace(self.module, deltas=(), backbone_fingerprint=self.original.fingerprint)

    @property
    def error(self) -> float:
        """Part of all changes of weights together that is lost."""
        changed = sum(loss.change**2 for loss in self.losses)
        lost = sum((loss.change * loss.error) ** 2 for loss in self.losses)
        return float((lost / changed) ** 0.5) if changed else 0.0


def compress_folder(
    folder: Path,
    backbone: Backbone,
    compression: Compression,
    *,
    task: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compressed:
    """Slow: a singular value decomposition for each linear. task: a head kind, where the folder leaves it open.

    Raises: RefusedCheckpoint for an encoder of another shape or what `read_tenant` refuses; CorruptFile.
    """
    with malformed_is_corrupt(folder):
        module, original = read_whole_model(folder, backbone, task)
    if backbone.config.has_pooler and not original.config.has_pooler:  # the folder left it out: it is the backbone's
        pooler = {name: weight for name, weight in backbone.weights.items() if name.startswith("pooler.")}
        original = replace(original, config=backbone.config, weights=original.weights | pooler)
    deltas: list[Delta] = []
    losses: list[WeightLoss] = []
    for layer in range(backbone.config.num_layers):
        for site in LINEAR_SITES:
            found, loss = _linear(backbone, original, layer, site, compression)
            deltas += found
            losses += loss
        progress(layer + 1, backbone.config.num_layers)
    deltas += _norms(backbone, original)
    losses += _dropped(backbone, original)
    method = {"method": "compressed", "max_rank": compression.max_rank, "max_error": compression.max_error}
    module = replace(module, deltas=tuple(deltas), source=module.source | method)
    return Compressed(module=module, original=original, losses=tuple(losses))


def _linear(
    backbone: Backbone, original: Backbone, layer: int, site: str, compression: Compression
) -> tuple[list[Delta], list[WeightLoss]]:
    """The deltas of one linear, and what is lost of its weight."""
    name = f"layers.{layer}.{site}"
    ours, theirs = backbone.weights[f"{name}.bias"], original.weights[f"{name}.bias"]
    deltas: list[Delta] = []
    if not torch.equal(ours, theirs):
        deltas.append(bias_to_affine(ours, theirs, layer=layer, site=site))
    diff = original.weights[f"{name}.weight"] - backbone.weights[f"{name}.weight"]
    count, change = int(diff.count_nonzero()), float(diff.norm())
    if not count:
        return deltas, []
    most = int(compression.max_density * diff.numel())
    if count <= most or not compression.max_rank:
        kept = diff if count <= most else _largest(diff, max(1, most))
        sparse = diff_to_sparse(kept, layer=layer, site=site)
        assert sparse is not None
        size, error = len(sparse.values), float((diff - kept).norm()) / change
        return [*deltas, sparse], [WeightLoss(weight=name, kind="sparse", size=size, change=change, error=error)]
    low_rank, error = _low_rank(diff, layer, site, compression)
    rank = low_rank.a.shape[1]
    return [*deltas, low_rank], [WeightLoss(weight=name, kind="low_rank", size=rank, change=change, error=error)]


def _largest(diff: Tensor, count: int) -> Tensor:
    """That many of the numbers, 0 in place of the others."""
    places = diff.abs().flatten().topk(count).indices
    return torch.zeros_like(diff).flatten().index_copy(0, places, diff.flatten()[places]).view_as(diff)


def _low_rank(diff: Tensor, layer: int, site: str, compression: Compression) -> tuple[LowRank, float]:
    """The best of its rank (Eckart, Young 1936), and the part of the change that it lacks."""
    u, s, vt = torch.linalg.svd(diff, full_matrices=False)
    lost = torch.cat([s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)]).sqrt() / s.norm()  # by rank, from 0
    enough = int((lost > compression.max_error).sum())
    rank = max(1, min(enough, compression.max_rank))
    root = s[:rank].sqrt()
    a, b = (vt[:rank].T * root).contiguous(), (u[:, :rank] * root).T.contiguous()
    return LowRank(layer=layer, site=site, a=a, b=b), float(lost[rank])


def _norms(backbone: Backbone, original: Backbone) -> Iterator[Norm]:
    places = [(layer, site) for layer in range(backbone.config.num_layers) for site in NORM_SITES if site != "emb_norm"]
    for layer, site in [(EMBEDDING_LAYER, "emb_norm"), *places]:
        name = site if layer == EMBEDDING_LAYER else f"layers.{layer}.{site}"
        keys = (f"{name}.weight", f"{name}.bias")
        if any(not torch.equal(backbone.weights[key], original.weights[key]) for key in keys):
            weight, bias = (original.weights[key].clone() for key in keys)
            yield Norm(layer=layer, site=site, weight=weight, bias=bias)


def _dropped(backbone: Backbone, original: Backbone) -> Iterator[WeightLoss]:
    """Tables, for which there is no delta."""
    for name, weight in backbone.weights.items():
        if name.startswith(("layers.", "emb_norm.", "pooler.")):
            continue
        diff = original.weights[name] - weight
        if count := int(diff.count_nonzero()):
            yield WeightLoss(weight=name, kind="dropped", size=count, change=float(diff.norm()), error=1.0)


def worst(losses: Sequence[WeightLoss]) -> WeightLoss | None:
    """The weight of which most is lost."""
    return max(losses, key=lambda loss: loss.change * loss.error, default=None)
