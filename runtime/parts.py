"""What an engine loads once, in a thread: backbone, tokenizer, model, module memory, store."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from runtime.clock import Clock
from runtime.config import EngineConfig
from runtime.request import Served, TenantKey
from runtime.store import TenantStore
from runtime.streams import Device, open_device
from runtime.trace import Trace
from vbert.arena import Arena
from vbert.errors import ConfigError, CorruptFile, UnknownTenant
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.kernels.warm_up import warm_up
from vbert.model import Model, resolve_dtype
from vbert.rows import MappedRows, publish_rows
from vbert.selftest import make_self_tests
from vbert.tenant import SelfTest
from vbert.tokenizer import Tokenizer

__all__ = ["Parts", "load_parts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """name: what the backbone is served as. canary: one short input with the answer of the dense reference. words: the
    word embeddings if they are not in the model's memory."""

    name: str
    backbone: Backbone
    tokenizer: Tokenizer
    model: Model
    words: MappedRows | None
    device: Device
    trace: Trace | None
    arena: Arena
    store: TenantStore
    canary: SelfTest

    def close(self) -> None:
        """After the last batch."""
        if self.trace is not None:
            self.trace.close()
        self.device.close()
        self.store.close()

    def serves(self, tenant: str) -> Served:
        """What a name serves now: the active version, or the backbone's own embeddings. Raises UnknownTenant."""
        longest = self.backbone.config.max_length
        if tenant == self.name:
            key = TenantKey(tenant=tenant, version=0, digest="")
            return Served(
                key=key,
                task="embed",
                problem="single_label",
                labels=(),
                kinds=("backbone",),
                max_length=longest,
                own_limit=False,
            )
        version = self.store.resolve(tenant)
        return Served(
            key=TenantKey(tenant=tenant, version=version.version, digest=version.digest),
            task=version.task,
            problem=version.problem,
            labels=version.labels,
            kinds=version.kinds or ("head_only",),
            max_length=version.max_length or longest,
            own_limit=version.max_length is not None,
        )


def load_parts(config: EngineConfig, clock: Clock) -> Parts:
    """Blocking. Raises what reading the backbone raises, and ConfigError when a tenant has the backbone's name."""
    if not config.backbone or not config.store:
        missing = "store" if config.backbone else "backbone"
        raise ConfigError(f"{missing} is empty; give a folder")
    with ExitStack() as undo:
        backbone = read_backbone(config.backbone)
        store = undo.enter_context(TenantStore(config.store, max_bytes=config.max_store_bytes or None))
        name = config.name or backbone.name
        if _is_taken(store, name):
            raise ConfigError(f"the store has a tenant {name!r}, the backbone's name; give the backbone another --name")
        tokenizer = Tokenizer.load(config.backbone, backbone.config)
        words = _mapped_words(backbone, config) if config.word_rows == "mapped" else None
        model = Model.load(backbone, config.dtype, config.device, words)
        warm_up(model.dtype)  # else the first tenant of a kind would hold up everybody's batches
        device = open_device(model.device, clock)
        undo.callback(device.close)
        parts = Parts(
            name=name,
            backbone=backbone,
            tokenizer=tokenizer,
            model=model,
            words=words,
            device=device,
            trace=Trace(config.trace, device) if config.trace else None,
            arena=Arena(backbone.config, backbone.fingerprint, model.dtype, config.module_budget_bytes),
            store=store,
            canary=make_self_tests(backbone, None, tokenizer, texts=("ok",))[0],
        )
        undo.pop_all()
    return parts


def _mapped_words(backbone: Backbone, config: EngineConfig) -> MappedRows:
    """The word embeddings of a backbone from a file of the store, written at the first start."""
    dtype = resolve_dtype(config.dtype)
    kind = str(dtype).removeprefix("torch.")
    path = Path(config.store) / f"words-{backbone.fingerprint.removeprefix('sha256:')[:16]}-{kind}.safetensors"
    if not path.exists():
        publish_rows(path, backbone.weights["word_embeddings"].to(dtype), backbone.fingerprint)
    words = MappedRows(path, backbone.fingerprint)
    if words.dtype != dtype or len(words.table) != backbone.config.vocab_size:
        raise CorruptFile(f"{path} holds {len(words.table)} rows of {words.dtype}; delete it and start again")
    return words


def _is_taken(store: TenantStore, name: str) -> bool:
    try:
        store.resolve(name)
    except UnknownTenant:
        return False
    return True
