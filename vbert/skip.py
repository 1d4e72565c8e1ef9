"""What can stand in for the lower layers of an encoder, in numbers and tensors: `Skip`. It computes nothing.

vbert/local_layers.py says what it means, vbert/formats/skip_folder.py how it lies in a folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from vbert.config import LINEAR_SITES, EncoderConfig
from vbert.errors import ConfigError

__all__ = ["SLOTS", "Skip", "SkipConfig", "own_paths", "skip_shapes", "usable_paths"]

SLOTS = 3  # of a tri-gram: the token left of the centre, the centre, the token right of it


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipConfig:
    """first_layer: of the encoder, that the merged n-grams enter. local_layers: those that see one n-gram at a time.
    window: tokens of an n-gram, 3, or 1 where neighbours are not looked at. sinks: constant key and value rows of each
    local layer. max_length: tokens that have a position in the merge."""

    first_layer: int
    local_layers: int
    window: int
    sinks: int
    max_length: int
    type_vocab_size: int

    def __post_init__(self) -> None:
        if self.window not in (1, SLOTS):
            raise ConfigError(f"window is {self.window}; n-grams have 3 tokens, or 1")
        low = {"first_layer": 0, "local_layers": 0, "sinks": 0, "max_length": 1, "type_vocab_size": 1}
        for name, least in low.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} is {value!r}; give a whole number, at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Skip:
    """What stands in for the lower layers. Word embeddings are the encoder's.

    weights: float32, names and shapes of `skip_shapes`. fingerprint: over these, their numbers and the encoder's
    fingerprint. base: the fingerprint of the skip backbone whose n-gram rows may stand beside its own: itself, or where
    the local layers were adapted to a domain, the one they were adapted from.
    """

    config: SkipConfig
    weights: dict[str, Tensor]
    fingerprint: str
    base: str


def skip_shapes(skip: SkipConfig, encoder: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a skip part."""
    width = encoder.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "position_embeddings": (SLOTS, width),  # of the local layers; the token type is in it
        "emb_norm.weight": (width,),
        "emb_norm.bias": (width,),
        "gate.weight": (SLOTS, width),
        "gate.bias": (SLOTS,),
        "merge.position_embeddings": (skip.max_length, width),
        "merge.type_embeddings": (skip.type_vocab_size, width),
        "merge.norm.weight": (width,),
        "merge.norm.bias": (width,),
    }
    for i in range(skip.local_layers):
        for site in LINEAR_SITES:
            shapes[f"layers.{i}.{site}.weight"] = (encoder.site_out(site), encoder.site_in(site))
            shapes[f"layers.{i}.{site}.bias"] = (encoder.site_out(site),)
        for norm in ("attn_norm", "ffn_norm"):
            shapes[f"layers.{i}.{norm}.weight"] = shapes[f"layers.{i}.{norm}.bias"] = (width,)
        shapes[f"layers.{i}.sink_keys"] = shapes[f"layers.{i}.sink_values"] = (skip.sinks, width)
    return shapes


def usable_paths(paths: Iterable[str], made_for: str, skip: Skip | None) -> tuple[str, ...]:
    """Which of the paths a tenant was trained for there are on a backbone with this skip part. made_for: the
    fingerprint of the skip part it was trained with, "" where with none."""
    fits = skip is not None and made_for == skip.fingerprint
    plain_way = skip is None or skip.config.first_layer > 0
    return tuple(path for path in paths if (plain_way if path == "plain" else fits))


def own_paths(skip: Skip | None) -> tuple[str, ...]:
    """Of a backbone itself: it embeds as it was made to, through all lower layers where it has them."""
    return ("plain",) if skip is None or skip.config.first_layer else ("exact",)
