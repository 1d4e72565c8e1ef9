"""The stores of what lower layers give, opened as the configuration says."""

from __future__ import annotations

from pathlib import Path

from runtime.config import EngineConfig
from runtime.cost import CostModel
from runtime.lower_stores import LowerStores
from runtime.ngram_store import NgramStore, PathCosts
from runtime.paths import table_files
from runtime.sequence_store import SequenceStore
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import Backbone
from vbert.model import Model
from vbert.ngram.table import NgramTable
from vbert.ngram.warm_up import warm_up_ngrams
from vbert.skip import SLOTS, SkipConfig

__all__ = ["open_stores"]

_ALONE_ROWS = 16  # a few rows take as long as so many: weights are read once in any case


def open_stores(config: EngineConfig, backbone: Backbone, model: Model, cost: CostModel | None) -> LowerStores:
    """Raises ConfigError, and what opening a table raises."""
    return LowerStores(_sequence_store(config, model), _ngram_store(config, backbone, model, cost))


def _sequence_store(config: EngineConfig, model: Model) -> SequenceStore | None:
    skip = None if model.local is None else model.local.config
    if config.sequence_store_bytes and skip is not None and not skip.first_layer:
        raise ConfigError(
            "sequence_store_bytes keeps what plain lower layers give, and this backbone has none; leave it out"
        )
    layer = config.sequence_layer or (skip.first_layer if skip else max(1, model.config.num_layers // 2))
    if not config.sequence_store_bytes:
        if config.sequence_disk_bytes:
            raise ConfigError("sequence_disk_bytes is the second tier of a sequence store; give sequence_store_bytes")
        return None
    if not 1 <= layer <= model.config.num_layers:
        raise ConfigError(
            f"sequence_layer is {layer}; the backbone has {model.config.num_layers} layers that see whole texts"
        )
    if skip is not None and layer != skip.first_layer:
        raise ConfigError(
            f"sequence_layer is {layer}, and this backbone skips to layer {skip.first_layer}; leave sequence_layer out"
        )
    try:
        return SequenceStore(
            layer=layer,
            width=model.config.hidden_size,
            dtype=model.dtype,
            fingerprint=model.fingerprint,
            num_bytes=config.sequence_store_bytes,
            disk_bytes=config.sequence_disk_bytes,
            disk=Path(config.store),
            pin=model.device.type == "cuda",
        )
    except (OSError, RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"sequence_store_bytes {config.sequence_store_bytes} of memory and sequence_disk_bytes "
            f"{config.sequence_disk_bytes} in {config.store} are not to be had ({error}); lower them"
        ) from error


def _ngram_store(config: EngineConfig, backbone: Backbone, model: Model, cost: CostModel | None) -> NgramStore | None:
    files, skip = table_files(config.ngrams), backbone.skip
    if skip is None:
        if files or config.ngram_cache_bytes:
            raise ConfigError(
                f"{backbone.folder} has no local layers, and n-grams are of no use to it; leave ngrams and "
                "ngram_cache_bytes out, or give the folder of a skip backbone"
            )
        return None
    width = model.config.hidden_size
    tables = {domain: [NgramTable(path, skip.base) for path in paths] for domain, paths in files.items()}
    for table in (table for every in tables.values() for table in every):
        if table.width != width:
            raise ConfigError(f"{table.path} has rows of {table.width} numbers, the backbone of {width}")
    for table in tables.get("", ()):
        if table.encoder != skip.fingerprint:
            raise ConfigError(
                f"{table.path} was built with other local layers than these ({table.encoder[:23]}), adapted to a "
                "domain; give it as DOMAIN=FILE, for tenants of the domain that did not learn exact"
            )
    warm_up_ngrams()
    costs = _costs(skip.config, model.config.num_layers, cost)
    try:
        return NgramStore(
            skip,
            width,
            tables=tables,
            cache_bytes=config.ngram_cache_bytes,
            costs=costs,
            most_shortened=config.max_backoff,
        )
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"ngram_cache_bytes {config.ngram_cache_bytes} of memory are not to be had ({error}); lower them"
        ) from error


def _costs(skip: SkipConfig, num_layers: int, cost: CostModel | None) -> PathCosts:
    """From the profile; without one, rows times layers, a few rows taking as long as `_ALONE_ROWS`. A row of a local
    layer never counts as less than one of a plain layer, which has the same products: a profile is a few noisy numbers,
    and what a forward takes besides its layers is not saved.
    """
    share = skip.first_layer / num_layers
    if cost is None:
        return PathCosts(
            plain_alone=lambda tokens: max(_ALONE_ROWS, tokens) * skip.first_layer,
            plain_margin=lambda tokens: tokens * skip.first_layer,
            local_alone=lambda missing: max(_ALONE_ROWS, SLOTS * missing) * skip.local_layers,
            local_margin=lambda missing: SLOTS * missing * skip.local_layers,
        )

    def plain_alone(tokens: int) -> float:
        whole = cost.forward_s(tokens, tokens) * share
        if not skip.local_layers:
            return whole
        return min(whole, cost.local_s(-(-tokens // SLOTS)) * skip.first_layer / skip.local_layers)

    many = 4096
    per_token = cost.forward_s(many) * share / many
    rows = SLOTS * skip.local_layers / max(1, skip.first_layer)  # of an n-gram, for each row of a token
    per_ngram = max(cost.local_s(many) / many, rows * per_token)
    return PathCosts(
        plain_alone=plain_alone,
        plain_margin=lambda tokens: tokens * per_token,
        local_alone=cost.local_s,
        local_margin=lambda missing: missing * per_ngram,
    )
