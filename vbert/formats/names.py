"""Names of modules in `transformers` models against our names of sites: one table per model type.

Readers go from a module path inside the base model (`encoder.layer.3.attention.self.query`) to (layer, site), and the
backbone reader goes from our weight names to keys in the file. Module paths never carry the base model's own prefix
(`bert.`): `strip_prefix` takes it off. No tensors here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vbert.config import EMBEDDING_LAYER, LINEAR_SITES, EncoderConfig

__all__ = [
    "NAMES",
    "HeadNames",
    "Names",
    "locate",
    "module_path",
    "strip_prefix",
    "weight_keys",
    "weight_shapes",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNames:
    """A head as `transformers` names it. layers: (module path in the whole model, activation after it), in order."""

    pooling: str
    shared_pooler: bool
    layers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """prefix: attribute holding the base model inside a model with a head. layers: path of the list of layers.
    sites: our site -> module path inside one layer. heads: PEFT task type -> what that model's head is."""

    prefix: str
    layers: str
    sites: dict[str, str]
    heads: dict[str, HeadNames]


_TOKEN_HEAD = HeadNames(pooling="none", shared_pooler=False, layers=(("classifier", "identity"),))
_POOLER_HEAD = HeadNames(pooling="cls", shared_pooler=True, layers=(("classifier", "identity"),))
_OUT_PROJ_HEAD = HeadNames(
    pooling="cls", shared_pooler=False, layers=(("classifier.dense", "tanh"), ("classifier.out_proj", "identity"))
)
_PRE_CLASSIFIER_HEAD = HeadNames(
    pooling="cls", shared_pooler=False, layers=(("pre_classifier", "relu"), ("classifier", "identity"))
)

_BERT_SITES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "attn_out": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
_MPNET_SITES = _BERT_SITES | {
    "q": "attention.attn.q",
    "k": "attention.attn.k",
    "v": "attention.attn.v",
    "attn_out": "attention.attn.o",
    "attn_norm": "attention.LayerNorm",
}
_DISTILBERT_SITES = {
    "q": "attention.q_lin",
    "k": "attention.k_lin",
    "v": "attention.v_lin",
    "attn_out": "attention.out_lin",
    "attn_norm": "sa_layer_norm",
    "ffn_up": "ffn.lin1",
    "ffn_down": "ffn.lin2",
    "ffn_norm": "output_layer_norm",
}


def _names(prefix: str, layers: str, sites: dict[str, str], sequence_head: HeadNames) -> Names:
    return Names(prefix=prefix, layers=layers, sites=sites, heads={"SEQ_CLS": sequence_head, "TOKEN_CLS": _TOKEN_HEAD})


NAMES = {
    "bert": _names("bert", "encoder.layer", _BERT_SITES, _POOLER_HEAD),
    "roberta": _names("roberta", "encoder.layer", _BERT_SITES, _OUT_PROJ_HEAD),
    "xlm-roberta": _names("roberta", "encoder.layer", _BERT_SITES, _OUT_PROJ_HEAD),
    "distilbert": _names("distilbert", "transformer.layer", _DISTILBERT_SITES, _PRE_CLASSIFIER_HEAD),
    "mpnet": _names("mpnet", "encoder.layer", _MPNET_SITES, _OUT_PROJ_HEAD),
}
_EMBEDDING_NORM = "embeddings.LayerNorm"


def strip_prefix(model_type: str, path: str) -> str:
    """The path inside the base model, of a path or key that may or may not carry the base model's prefix."""
    return path.removeprefix(NAMES[model_type].prefix + ".")


def module_path(model_type: str, layer: int, site: str) -> str:
    """Where a site lives inside the base model."""
    if layer == EMBEDDING_LAYER:
        return _EMBEDDING_NORM
    names = NAMES[model_type]
    return f"{names.layers}.{layer}.{names.sites[site]}"


def locate(model_type: str, path: str) -> tuple[int, str] | None:
    """(layer, site) of a module path inside the base model; None where no site of ours lives there."""
    if path == _EMBEDDING_NORM:
        return EMBEDDING_LAYER, "emb_norm"
    names = NAMES[model_type]
    match = re.fullmatch(re.escape(names.layers) + r"\.(\d+)\.(.+)", path)
    if match is None:
        return None
    site = next((site for site, module in names.sites.items() if module == match[2]), None)
    return None if site is None else (int(match[1]), site)


def weight_keys(config: EncoderConfig) -> dict[str, str]:
    """Our name of every weight of a backbone -> its key in the file, without the base model's prefix."""
    keys = {
        "word_embeddings": "embeddings.word_embeddings.weight",
        "position_embeddings": "embeddings.position_embeddings.weight",
    }
    if config.type_vocab_size:
        keys["type_embeddings"] = "embeddings.token_type_embeddings.weight"
    if config.relative_buckets:
        keys["relative_attention_bias"] = "encoder.relative_attention_bias.weight"
    modules = {"emb_norm": _EMBEDDING_NORM}
    for layer in range(config.num_layers):
        for site in NAMES[config.model_type].sites:
            modules[f"layers.{layer}.{site}"] = module_path(config.model_type, layer, site)
    if config.has_pooler:
        modules["pooler"] = "pooler.dense"
    for ours, module in modules.items():
        keys[f"{ours}.weight"] = f"{module}.weight"
        keys[f"{ours}.bias"] = f"{module}.bias"
    return keys


def weight_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Our name of every weight of a backbone -> its shape, linears as [out, in]."""
    hidden = config.hidden_size
    positions = config.max_length + config.position_offset
    tables = {
        "word_embeddings": (config.vocab_size, hidden),
        "position_embeddings": (positions, hidden),
        "type_embeddings": (config.type_vocab_size, hidden),
        "relative_attention_bias": (config.relative_buckets, config.num_heads),
        "pooler.weight": (hidden, hidden),
    }
    return {name: tables.get(name) or _layer_shape(config, name) for name in weight_keys(config)}


def _layer_shape(config: EncoderConfig, name: str) -> tuple[int, ...]:
    *_, site, part = name.split(".")
    if site in LINEAR_SITES and part == "weight":
        return config.site_out(site), config.site_in(site)
    return (config.site_out(site),)
