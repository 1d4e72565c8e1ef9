"""Random tenants of every delta kind and head, large enough that a wrong one shows in the first digit."""

from __future__ import annotations

from dataclasses import replace

import torch

from vbert.config import EMBEDDING_LAYER, LINEAR_SITES
from vbert.formats.transformers_folder import Backbone
from vbert.tenant import (
    BOTTLENECK_SITES,
    Affine,
    Bottleneck,
    Dense,
    Exit,
    Head,
    LowRank,
    Norm,
    OwnWeights,
    Sparse,
    TenantModule,
)

DELTA_KINDS = ("lora", "lora_all", "houlsby", "pfeiffer", "parallel", "vbert", "bitfit", "ia3", "mask", "diff", "none")
HEADS = ("classify", "multi_label", "regression", "pooler", "token_classify", "embed", "embed_cls", "rerank")


class Factory:
    """Seeded makers of deltas for one backbone."""

    def __init__(self, backbone: Backbone, seed: int) -> None:
        self.backbone, self.config = backbone, backbone.config
        self.rng = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 0.3, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self.rng) * std + mean

    def tenant(self, *kinds: str, head: str = "classify", num_labels: int = 3) -> TenantModule:
        deltas = tuple(delta for kind in kinds for delta in getattr(self, kind)())
        return TenantModule(
            backbone_fingerprint=self.backbone.fingerprint,
            deltas=deltas,
            head=self.head(head, num_labels),
            source={"format": "test", "kinds": list(kinds)},
        )

    def with_exits(self, module: TenantModule, *layers: int, threshold: float = 0.6) -> TenantModule:
        heads = [self.head("classify", len(module.head.labels)) for _ in layers]
        exits = tuple(
            Exit(layer=layer, head=replace(module.head, shared_pooler=False, layers=head.layers))
            for layer, head in zip(layers, heads, strict=True)
        )
        return replace(module, exits=exits, exit_threshold=threshold)

    def whole(self):
        """Weights of its own, about as large as the backbone's."""
        for (layer, site), parts in self.config.weight_shapes().items():
            is_norm = site.endswith("norm")
            weight = self.normal(*parts["weight"], std=0.1, mean=1.0 if is_norm else 0.0)
            bias = self.normal(*parts["bias"], std=0.1) if "bias" in parts else None
            yield OwnWeights(layer=layer, site=site, weight=weight, bias=bias)

    def low_rank(self, sites, rank):
        c = self.config
        return [
            LowRank(layer=i, site=s, a=self.normal(c.site_in(s), rank), b=self.normal(rank, c.site_out(s)))
            for i in range(c.num_layers)
            for s in sites
        ]

    def lora(self):
        return self.low_rank(("q", "v"), 4)

    def lora_all(self):
        return self.low_rank(LINEAR_SITES, 3)

    def bottleneck(self, taps, subs=("attn", "ffn"), size=5, activation="relu"):
        h = self.config.hidden_size
        return [
            Bottleneck(
                layer=i,
                site=f"{sub}.{taps}",
                activation=activation,
                down=self.normal(h, size),
                down_bias=self.normal(size),
                up=self.normal(size, h),
                up_bias=self.normal(h),
            )
            for i in range(self.config.num_layers)
            for sub in subs
            if f"{sub}.{taps}" in BOTTLENECK_SITES
        ]

    def houlsby(self):
        return self.bottleneck("output>output", activation="silu")

    def pfeiffer(self):
        return self.bottleneck("normed>output", subs=("ffn",), size=4)

    def parallel(self):
        return self.bottleneck("input>output", subs=("ffn",), activation="gelu")

    def vbert(self):
        return self.bottleneck("after>after", subs=("attn",), activation="gelu")

    def norm(self, layer, site):
        h = self.config.hidden_size
        return Norm(layer=layer, site=site, weight=self.normal(h, std=0.1, mean=1.0), bias=self.normal(h, std=0.1))

    def bitfit(self):
        c = self.config
        deltas = [self.norm(EMBEDDING_LAYER, "emb_norm")]
        for i in range(c.num_layers):
            deltas += [Affine(layer=i, site=s, shift=self.normal(c.site_out(s))) for s in LINEAR_SITES]
            deltas += [self.norm(i, "attn_norm"), self.norm(i, "ffn_norm")]
        return deltas

    def ia3(self):
        c = self.config
        deltas = []
        for i in range(c.num_layers):
            deltas += [Affine(layer=i, site=s, scale=self.normal(c.hidden_size, mean=1.0)) for s in ("k", "v")]
            for site in ("attn_out", "ffn_up", "ffn_down"):
                scale = self.normal(c.site_in(site), mean=1.0)
                deltas.append(Affine(layer=i, site=site, input_scale=scale))
        return deltas

    def sparse(self, sites, density):
        deltas = []
        for i in range(self.config.num_layers):
            for site in sites:
                shape = (self.config.site_out(site), self.config.site_in(site))
                kept = torch.rand(shape, generator=self.rng) < density
                starts = torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).to(torch.int32)
                columns = kept.nonzero()[:, 1].to(torch.int32)
                values = self.normal(len(columns))
                deltas.append(Sparse(layer=i, site=site, row_starts=starts, columns=columns, values=values))
        return deltas

    def mask(self):
        return self.sparse(LINEAR_SITES, 0.05)

    def diff(self):
        return [*self.sparse(("q", "ffn_down"), 0.01), *self.bitfit()]

    def none(self):
        return []

    def head(self, kind: str, num_labels: int) -> Head:
        h = self.config.hidden_size
        labels = tuple(f"label{i}" for i in range(num_labels))

        def dense(out, activation="identity"):
            return Dense(weight=self.normal(out, h), bias=self.normal(out), activation=activation)

        match kind:
            case "multi_label" | "regression":
                return Head(kind="classify", layers=(dense(h, "tanh"), dense(num_labels)), problem=kind, labels=labels)
            case "pooler":
                return Head(kind="classify", shared_pooler=True, layers=(dense(num_labels),), labels=labels)
            case "token_classify":
                return Head(kind=kind, pooling="none", layers=(dense(num_labels),), labels=labels)
            case "embed":
                return Head(kind="embed", pooling="mean", layers=(dense(7),))
            case "embed_cls":
                return Head(kind="embed", pooling="cls", normalise=False)
            case "rerank":
                return Head(kind="rerank", pooling="cls", layers=(dense(1),), labels=("score",))
            case _:
                return Head(kind="classify", pooling="mean", layers=(dense(num_labels),), labels=labels)
