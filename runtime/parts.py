"""What an engine loads once, in a thread: backbone, tokenizer, model, module memory, store."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.config import EngineConfig
from runtime.request import Served, TenantKey
from runtime.store import TenantStore
from vbert.arena import Arena
from vbert.errors import ConfigError, UnknownTenant
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.kernels.warm_up import warm_up
from vbert.model import Model
from vbert.selftest import make_self_tests
from vbert.tenant import SelfTest
from vbert.tokenizer import Tokenizer

__all__ = ["Parts", "load_parts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """name: what the backbone is served as. canary: one short input with the answer of the dense reference."""

    name: str
    backbone: Backbone
    tokenizer: Tokenizer
    model: Model
    arena: Arena
    store: TenantStore
    canary: SelfTest

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


def load_parts(config: EngineConfig) -> Parts:
    """Blocking. Raises what reading the backbone raises, and ConfigError when a tenant has the backbone's name."""
    if not config.backbone or not config.store:
        missing = "store" if config.backbone else "backbone"
        raise ConfigError(f"{missing} is empty; give a folder")
    backbone = read_backbone(config.backbone)
    tokenizer = Tokenizer.load(config.backbone, backbone.config)
    model = Model.load(backbone, config.dtype, config.device)
    warm_up(model.dtype)  # else the first tenant of a kind would hold up everybody's batches
    store = TenantStore(config.store, max_bytes=config.max_store_bytes or None)
    parts = Parts(
        name=config.name or backbone.name,
        backbone=backbone,
        tokenizer=tokenizer,
        model=model,
        arena=Arena(backbone.config, backbone.fingerprint, model.dtype, config.module_budget_bytes),
        store=store,
        canary=make_self_tests(backbone, None, tokenizer, texts=("ok",))[0],
    )
    if _is_taken(store, parts.name):
        store.close()
        raise ConfigError(
            f"the store has a tenant {parts.name!r}, the backbone's name; give the backbone another --name"
        )
    return parts


def _is_taken(store: TenantStore, name: str) -> bool:
    try:
        store.resolve(name)
    except UnknownTenant:
        return False
    return True
