"""What a backbone is, in numbers: `EncoderConfig`, and the names of its sites. No tensors here.

Sites are the places where a tenant may differ from the backbone (docs/architecture.md). One layer has six
linears and two LayerNorms; outside the layers there is the LayerNorm of the embeddings, written as layer -1.
"""

from __future__ import annotations

from dataclasses import dataclass

from vbert.errors import ConfigError

__all__ = [
    "ACTIVATIONS",
    "EMBEDDING_LAYER",
    "LINEAR_SITES",
    "MODEL_TYPES",
    "NORM_SITES",
    "WEIGHT_SITES",
    "EncoderConfig",
]

LINEAR_SITES = ("q", "k", "v", "attn_out", "ffn_up", "ffn_down")
NORM_SITES = ("attn_norm", "ffn_norm", "emb_norm")
WEIGHT_SITES = ("qkv", "attn_out", "attn_norm", "ffn_up", "ffn_down", "ffn_norm")  # of a layer; qkv: rows of q, k, v
EMBEDDING_LAYER = -1
MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "distilbert", "mpnet")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh", "identity")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Shape and constants of one frozen encoder. Lengths in tokens, widths in numbers.

    `max_length` is the longest sequence that has a position embedding, special tokens included.
    `position_offset` is the position id of the first token (RoBERTa, XLM-R and MPNet: pad_token_id + 1).
    `relative_buckets` is 0 but for MPNet, whose bias is added to the attention scores of every layer.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_size: int
    vocab_size: int
    max_length: int
    type_vocab_size: int
    layer_norm_eps: float
    activation: str
    pad_token_id: int
    position_offset: int = 0
    relative_buckets: int = 0
    has_pooler: bool = False

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ConfigError(f"model_type {self.model_type!r} is not served; one of {', '.join(MODEL_TYPES)} is")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation {self.activation!r} is not served; one of {', '.join(ACTIVATIONS)} is")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    def site_in(self, site: str) -> int:
        """Width of the rows that enter a linear site."""
        return self.ffn_size if site == "ffn_down" else self.hidden_size

    def site_out(self, site: str) -> int:
        """Width of the rows that leave a site (a LayerNorm keeps the width)."""
        return self.ffn_size if site == "ffn_up" else self.hidden_size

    def weight_shapes(self) -> dict[tuple[int, str], dict[str, tuple[int, ...]]]:
        """All weights of the encoder: (layer, site) -> part -> shape, linears as [out, in]."""
        hidden = self.hidden_size
        norm: dict[str, tuple[int, ...]] = {"weight": (hidden,), "bias": (hidden,)}
        tables = {
            "word_embeddings": (self.vocab_size, hidden),
            "position_embeddings": (self.max_length + self.position_offset, hidden),
            "type_embeddings": (self.type_vocab_size, hidden),
            "relative_attention_bias": (self.relative_buckets, self.num_heads),
        }
        shapes: dict[tuple[int, str], dict[str, tuple[int, ...]]]
        shapes = {(EMBEDDING_LAYER, site): {"weight": shape} for site, shape in tables.items() if shape[0]}
        shapes[EMBEDDING_LAYER, "emb_norm"] = dict(norm)
        for layer in range(self.num_layers):
            for site in WEIGHT_SITES:
                out = 3 * hidden if site == "qkv" else self.site_out(site)
                linear: dict[str, tuple[int, ...]] = {"weight": (out, self.site_in(site)), "bias": (out,)}
                shapes[layer, site] = dict(norm) if site in NORM_SITES else linear
        return shapes
