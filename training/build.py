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
        return TenantModel(backbone, _deltas(config, backbone), head)


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
    layers = range(encoder.num_layers - (config.top_layers or encoder.num_layers), encoder.num_layers)
    match config.method:
        case "lora":
            return [_low_rank(config, encoder, i, site) for i in layers for site in config.targets]
        case "bottleneck":
            return [_bottleneck(config, encoder, i, site) for i in layers for site in PLACEMENTS[config.placement]]
        case "bitfit":
            return _bitfit(backbone, layers)
        case _:
            return []


def _low_rank(config: TrainConfig, encoder: EncoderConfig, layer: int, site: str) -> LowRankDelta:
    return LowRankDelta(encoder, layer, site, rank=config.rank, alpha=config.alpha, dropout=config.lora_dropout)


def _bottleneck(config: TrainConfig, encoder: EncoderConfig, layer: int, site: str) -> BottleneckDelta:
    return BottleneckDelta(encoder, layer, site, size=config.bottleneck_size, activation=config.activation)


def _bitfit(backbone: Backbone, layers: range) -> list[TrainableDelta]:
    """Every bias of the layers; that of the embeddings' LayerNorm too when all layers are tuned."""
    shifts = [ShiftDelta(backbone.config, i, site) for i in layers for site in LINEAR_SITES]
    norms = [(i, site, f"layers.{i}.{site}") for i in layers for site in ("attn_norm", "ffn_norm")]
    if len(layers) == backbone.config.num_layers:
        norms.append((EMBEDDING_LAYER, "emb_norm", "emb_norm"))
    shared = {name: (backbone.weights[f"{name}.weight"], backbone.weights[f"{name}.bias"]) for *_, name in norms}
    return [*shifts, *(NormBiasDelta(layer, site, shared[name]) for layer, site, name in norms)]
