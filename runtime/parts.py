"""What an engine loads once, in a thread: backbone, tokenizer, model, module memory, store."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from runtime.clock import Clock
from runtime.config import EngineConfig
from runtime.cost import CostModel
from runtime.lower_stores import LowerStores
from runtime.open_stores import open_stores
from runtime.own_profile import own_profile
from runtime.recorder import Recorder
from runtime.request import Served, TenantKey
from runtime.store import TenantStore
from runtime.streams import Device, open_device
from runtime.trace import Trace
from vbert.arena import Arena
from vbert.errors import ConfigError, CorruptFile, UnknownTenant
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.kernels.warm_up import warm_up
from vbert.memory import Slabs
from vbert.model import Model, resolve_device, resolve_dtype
from vbert.rows import MappedRows, publish_rows
from vbert.selftest import make_self_tests
from vbert.skip import Skip, own_paths, usable_paths
from vbert.tenant import SelfTest
from vbert.tokenizer import Tokenizer

__all__ = ["Parts", "host_budget_bytes", "load_parts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """name: what the backbone is served as. canary: one short input with the answer of the dense reference. words: the
    word embeddings if they are not in the model's memory. cost: the profile of this machine, None where none was asked
    for."""

    name: str
    backbone: Backbone
    tokenizer: Tokenizer
    model: Model
    words: MappedRows | None
    device: Device
    trace: Trace | None
    recorder: Recorder | None
    arena: Arena
    host_arena: Arena | None
    stores: LowerStores
    store: TenantStore
    canary: SelfTest
    cost: CostModel | None

    def close(self) -> None:
        """After the last batch."""
        if self.trace is not None:
            self.trace.close()
        if self.recorder is not None:
            self.recorder.close()
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
                paths=own_paths(self.backbone.skip),
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
            paths=usable_paths(version.paths, version.skip_fingerprint, self.backbone.skip),
            exits=version.exits,
            exit_threshold=version.exit_threshold,
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
        model = Model.load(
            backbone,
            config.dtype,
            config.device,
            words,
            graphs=config.cuda_graphs == "on",
            operator_streams=config.operator_streams,
        )
        warm_up(model.dtype, model.device)  # else the first tenant of a kind would hold up everybody's batches
        cost = own_profile(config, backbone, model)
        model.free_memory()  # buffers of this thread's stream, which forwards do not run on
        device = open_device(model.device, clock)
        undo.callback(device.close)
        arena, host_arena = _arenas(config, model, device, backbone.skip)
        stores = open_stores(config, backbone, model, cost)
        parts = Parts(
            name=name,
            backbone=backbone,
            tokenizer=tokenizer,
            model=model,
            words=words,
            device=device,
            trace=Trace(config.trace, device) if config.trace else None,
            arena=arena,
            host_arena=host_arena,
            stores=stores,
            store=store,
            canary=make_self_tests(backbone, None, tokenizer, texts=("ok",))[0],
            cost=cost,
            recorder=_recorder(config, name, clock) if config.record else None,
        )
        undo.pop_all()
    return parts


def _recorder(config: EngineConfig, name: str, clock: Clock) -> Recorder:
    told = ("policy", "max_batch_tokens", "max_queue_inputs", "default_deadline_s", "module_budget_bytes")
    return Recorder(config.record, {"name": name} | {option: getattr(config, option) for option in told}, clock)


def _arenas(config: EngineConfig, model: Model, device: Device, skip: Skip | None) -> tuple[Arena, Arena | None]:
    """Where forwards read modules, and pinned host memory behind it if there is a device. Raises ConfigError."""
    make = partial(Arena, model.config, model.fingerprint, model.dtype, skip=skip)
    budget, host_budget = config.module_budget_bytes, host_budget_bytes(config, model.device)
    if not host_budget:
        return make(budget), None
    try:
        memory, host_memory = Slabs(device.empty(budget)), Slabs(device.pinned(host_budget))
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError, and what cupy raises for pinned memory
        raise ConfigError(
            f"module_budget_bytes {budget} on the device and host_budget_bytes {host_budget} of pinned memory are not "
            f"to be had ({error}); lower them"
        ) from error
    return make(budget, memory=memory), make(host_budget, memory=host_memory)


def host_budget_bytes(config: EngineConfig, device: torch.device) -> int:
    """Bytes of the tier between disk and device; 0: there is none, since the host's memory is the device's."""
    if config.host_budget_bytes or device.type == "cpu":
        return config.host_budget_bytes
    return 4 * config.module_budget_bytes


def _mapped_words(backbone: Backbone, config: EngineConfig) -> MappedRows:
    """The word embeddings of a backbone from a file of the store, written at the first start."""
    dtype = resolve_dtype(config.dtype, resolve_device(config.device))
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
