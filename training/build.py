"""From a `TrainConfig` to an untrained `TenantModel`: which deltas at which sites, and which head."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from training.config import PLACEMENTS, TrainConfig
from training.deltas import BottleneckDelta, LowRankDelta, NormBiasDelta, ShiftDelta, TrainableDelta
from training.head import TrainableHead
from training.model import TenantModel
from vbert.config import EMBEDDING_LAYER, LINEAR_SITES, EncoderConfig
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import Backbone
from vbert.skip import own_paths
from vbert.tenant import PATHS

__all__ = ["build_model"]


def build_model(
    config: TrainConfig, backbone: Backbone, labels: tuple[str, ...], targets: Sequence[float] = ()
) -> TenantModel:
    """The same config, backbone and labels give the same weights; the caller's random state is left as it was.

    targets: the numbers of the training rows, for regression.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = _head(config, backbone, labels, targets)
        deltas, paths = _deltas(config, backbone), tenant_paths(config, backbone)
        exits = {layer: _head(config, backbone, labels, ()) for layer in _exit_layers(config, backbone)}
        return TenantModel(backbone, deltas, head, paths=paths, backoff_share=config.backoff_share, exits=exits)


def tenant_paths(config: TrainConfig, backbone: Backbone) -> tuple[str, ...]:
    """Those to be learnt. Raises ConfigError for one that the backbone does not have."""
    skip = backbone.skip
    have = ("plain",) if skip is None else PATHS if skip.config.first_layer else PATHS[1:]
    if bad := [path for path in config.paths if path not in have]:
        raise ConfigError(
            f"the backbone has no path {bad[0]}, it has {', '.join(have)}; give one of these", param="paths"
        )
    return tuple(path for path in PATHS if path in config.paths) or own_paths(skip)


def _exit_layers(config: TrainConfig, backbone: Backbone) -> list[int]:
    """Ascending. Raises ConfigError for one that there cannot be."""
    first, last = max(1, _first_layer(config, backbone)), backbone.config.num_layers - 1
    if bad := [layer for layer in config.exits if not first <= layer <= last]:
        raise ConfigError(f"exits has {bad[0]}; give layers from {first} to {last} of this backbone", param="exits")
    return sorted(set(config.exits))


def _head(config: TrainConfig, backbone: Backbone, labels: tuple[str, ...], targets: Sequence[float]) -> TrainableHead:
    tokens = config.task == "token_classify"
    pooling = backbone.embed_head.pooling if config.pooling == "auto" else config.pooling
    return TrainableHead(
        backbone.config.hidden_size,
        kind="token_classify" if tokens else "classify",
        pooling="none" if tokens else pooling,
        problem="regression" if config.task == "regression" else "single_label",
        labels=labels,
        inner_size=config.inner_size,
        dropout=config.head_dropout,
        target_mean=statistics.fmean(targets) if targets else 0.0,
        target_std=statistics.pstdev(targets) or 1.0 if targets else 1.0,
    )


def _deltas(config: TrainConfig, backbone: Backbone) -> list[TrainableDelta]:
    encoder = backbone.config
    if config.top_layers > encoder.num_layers:
        raise ConfigError(
            f"top_layers is {config.top_layers} and the backbone has {encoder.num_layers} layers; give at most that"
        )
    first = _first_layer(config, backbone)
    if encoder.num_layers - config.top_layers < first:
        raise ConfigError(
            f"top_layers is {config.top_layers}, and a tenant that skips the lower {first} of {encoder.num_layers} "
            f"layers has deltas above them only; give at most {encoder.num_layers - first}"
        )
    layers = range(encoder.num_layers - config.top_layers if config.top_layers else first, encoder.num_layers)
    match config.method:
        case "lora":
            return [_low_rank(config, encoder, i, site) for i in layers for site in config.targets]
        case "bottleneck":
            return [_bottleneck(config, encoder, i, site) for i in layers for site in PLACEMENTS[config.placement]]
        case "bitfit":
            return _bitfit(backbone, layers)
        case _:
            return []


def _first_layer(config: TrainConfig, backbone: Backbone) -> int:
    """The lowest layer that may have a delta."""
    skips = tenant_paths(config, backbone) != ("plain",)
    return backbone.skip.config.first_layer if skips and backbone.skip is not None else 0


def _low_rank(config: TrainConfig, encoder: EncoderConfig, layer: int, site: str) -> LowRankDelta:
    return LowRankDelta(encoder, layer, site, rank=config.rank, alpha=config.alpha, dropout=config.lora_dropout)


def _bottleneck(config: TrainConfig, encoder: EncoderConfig, layer: int, site: str) -> BottleneckDelta:
    return BottleneckDelta(encoder, layer, site, size=config.bottleneck_size, activation=config.activation)


def _bitfit(backbone: Backbone, layers: range) -> list[TrainableDelta]:
    """Every bias of the layers; that of the embeddings' LayerNorm too when all layers are tuned."""
    shifts = [ShiftDelta(backbone.config, i, site) for i in layers for site in LINEAR_SITES]
    norms = [(i, site, f"layers.{i}.{site}") for i in layers for site in ("attn_norm", "ffn_norm")]
    if len(layers) == backbone.config.num_layers and own_paths(backbone.skip) == ("plain",):
        norms.append((EMBEDDING_LAYER, "emb_norm", "emb_norm"))
    shared = {name: (backbone.weights[f"{name}.weight"], backbone.weights[f"{name}.bias"]) for *_, name in norms}
    return [*shifts, *(NormBiasDelta(layer, site, shared[name]) for layer, site, name in norms)]
