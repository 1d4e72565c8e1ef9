"""A fully fine-tuned `transformers` folder as a tenant of the backbone it came from: what training changed, made small.

Biases, LayerNorms and the head are kept as they are. The change of each linear's weight becomes a sparse delta where
few weights changed, else a low-rank one of the smallest rank that leaves no more than a given part of it, or, without
ranks, its largest numbers. With texts like those to come, a rank keeps what matters to the rows that enter there, and
biases make up for the mean of what is lost. Embeddings stay the backbone's, for which there is no delta; how much is
lost is told, and has to be looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vbert.config import EMBEDDING_LAYER, LINEAR_SITES, NORM_SITES
from vbert.errors import RefusedCheckpoint
from vbert.formats.input_moments import InputMoments, input_moments
from vbert.formats.native import bias_to_affine, diff_to_sparse
from vbert.formats.tensors import malformed_is_corrupt
from vbert.formats.transformers_folder import Backbone
from vbert.formats.transformers_head import read_whole_model
from vbert.tenant import Delta, LowRank, Norm, TenantModule
from vbert.tokenizer import Encoded

__all__ = ["Compressed", "Compression", "WeightLoss", "compress_folder", "worst"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """max_rank: of a low-rank delta; 0: there are none. max_error: part of a weight's change (by Frobenius norm; with
    texts, of what leaves the linear) that may be lost where max_rank allows it. max_density: part of the weights that
    may have changed for a sparse delta, which loses none; without low-rank ones, the part of them that is kept."""

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
    inputs: Sequence[Encoded] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compressed:
    """Slow: a singular value decomposition for each linear. task: a head kind, where the folder leaves it open. inputs:
    like those to come, for which it is fitted; hundreds of texts, which `transformers` computes.

    Raises: RefusedCheckpoint for an encoder of another shape or what `read_tenant` refuses; CorruptFile.
    """
    with malformed_is_corrupt(folder):
        module, original = read_whole_model(folder, backbone, task)
    if backbone.config.has_pooler and not original.config.has_pooler:  # the folder left it out: it is the backbone's
        pooler = {name: weight for name, weight in backbone.weights.items() if name.startswith("pooler.")}
        original = replace(original, config=backbone.config, weights=original.weights | pooler)
    deltas: list[Delta] = []
    losses: list[WeightLoss] = []
    moments = input_moments(original, inputs)
    for layer in range(backbone.config.num_layers):
        for site in LINEAR_SITES:
            found, loss = _linear(backbone, original, layer, site, compression, moments.get((layer, site)))
            deltas += found
            losses += loss
        progress(layer + 1, backbone.config.num_layers)
    deltas += _norms(backbone, original)
    losses += _dropped(backbone, original)
    method = {"method": "compressed", "max_rank": compression.max_rank, "max_error": compression.max_error}
    module = replace(module, deltas=tuple(deltas), source=module.source | method)
    return Compressed(module=module, original=original, losses=tuple(losses))


def _linear(
    backbone: Backbone,
    original: Backbone,
    layer: int,
    site: str,
    compression: Compression,
    moments: InputMoments | None,
) -> tuple[list[Delta], list[WeightLoss]]:
    """The deltas of one linear, and what is lost of its weight."""
    name = f"layers.{layer}.{site}"
    ours, theirs = backbone.weights[f"{name}.bias"], original.weights[f"{name}.bias"]
    diff = original.weights[f"{name}.weight"] - backbone.weights[f"{name}.weight"]
    deltas: list[Delta] = []
    losses: list[WeightLoss] = []
    if count := int(diff.count_nonzero()):
        most = int(compression.max_density * diff.numel())
        if count <= most or not compression.max_rank:
            kept = diff if count <= most else _largest(diff, max(1, most))
            sparse = diff_to_sparse(kept, layer=layer, site=site)
            assert sparse is not None
            deltas, kind, size = [sparse], "sparse", len(sparse.values)
        else:
            a, b = _low_rank(diff, compression, moments)
            deltas, kind, size, kept = [LowRank(layer=layer, site=site, a=a, b=b)], "low_rank", len(b), (a @ b).T
        lost, change = diff - kept, float(diff.norm())
        losses = [WeightLoss(weight=name, kind=kind, size=size, change=change, error=float(lost.norm()) / change)]
        theirs = theirs if moments is None else theirs + lost @ moments.mean
    if not torch.equal(ours, theirs):
        deltas.append(bias_to_affine(ours, theirs, layer=layer, site=site))
    return deltas, losses


def _largest(diff: Tensor, count: int) -> Tensor:
    """That many of the numbers, 0 in place of the others."""
    places = diff.abs().flatten().topk(count).indices
    return torch.zeros_like(diff).flatten().index_copy(0, places, diff.flatten()[places]).view_as(diff)


def _low_rank(diff: Tensor, compression: Compression, moments: InputMoments | None) -> tuple[Tensor, Tensor]:
    """The best A, B of their rank for diff (Eckart, Young 1936), or with moments for what it does to such rows."""
    factor = torch.eye(diff.shape[1]) if moments is None else moments.factor()
    u, s, vt = torch.linalg.svd(diff @ factor, full_matrices=False)
    lost = torch.cat([s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)]).sqrt() / s.norm()  # by rank, from 0
    enough = int((lost > compression.max_error).sum())
    rank = max(1, min(enough, compression.max_rank))
    root = s[:rank].sqrt()
    a = torch.linalg.solve_triangular(factor.T, vt[:rank].T * root, upper=True)
    return a.contiguous(), (u[:, :rank] * root).T.contiguous()


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
