"""This project as a system under test: `Model.forward` with resident tenants, and the whole `Engine` in process."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from benchmarks.peers import adapter_name
from benchmarks.workload import Requests
from runtime import Engine, EngineConfig
from tests.random_tenants import Factory
from vbert.arena import Arena, ResidentTenant
from vbert.checkpoint import write_tenant
from vbert.formats import read_tenant
from vbert.formats.transformers_folder import Backbone
from vbert.header import parse_header
from vbert.memory import Memory
from vbert.model import Model, SequenceInput
from vbert.tenant import SelfTest, TenantModule

__all__ = [
    "MIX",
    "InEngine",
    "Packed",
    "load",
    "lora_modules",
    "mixed_modules",
    "random_adapters",
    "random_loras",
    "with_self_tests",
]

_ARENA_BYTES = 4 * 2**30  # address space, not memory
# Kinds of the mixed workload, in equal parts; the names are those of `Factory`, the sizes what papers use.
MIX = ("lora", "houlsby", "pfeiffer", "parallel", "bitfit", "ia3", "mask", "diff")


class Packed:
    """`Model.forward` on one packed batch, packing included. tenants None: the bare backbone on the same rows."""

    def __init__(self, model: Model, tenants: Sequence[ResidentTenant] | None, requests: Requests) -> None:
        self.model = model
        self.sequences = [
            SequenceInput(ids, [0] * len(ids), tenants[t] if tenants else None)
            for ids, t in zip(requests.token_ids, requests.tenants, strict=True)
        ]

    def __call__(self) -> Tensor:
        return torch.stack(self.model.forward(self.model.pack(self.sequences)))


class InEngine:
    """The same requests at once through `Engine`: admission, queue, policy, residency, compute thread, futures."""

    def __init__(self, config: EngineConfig, modules: Sequence[TenantModule], requests: Requests) -> None:
        self._config = config
        self._modules, self._requests = modules, requests
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> Self:
        self._engine = self._loop.run_until_complete(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._engine.stop())
        self._loop.close()

    def __call__(self) -> Tensor:
        return self._loop.run_until_complete(self._embed_all())

    async def _start(self) -> Engine:
        engine = Engine(self._config)
        await engine.start()
        for t, module in enumerate(self._modules):
            await engine.add_tenant(adapter_name(t), write_tenant(module))
        return engine

    async def _embed_all(self) -> Tensor:
        pairs = zip(self._requests.token_ids, self._requests.tenants, strict=True)
        results = await asyncio.gather(*(self._engine.embed(adapter_name(t), [list(ids)]) for ids, t in pairs))
        return torch.stack([torch.from_numpy(result.embeddings[0]) for result in results])


def load(
    model: Model,
    backbone: Backbone,
    modules: Sequence[TenantModule],
    folder: Path,
    *,
    memory: Memory | None = None,
) -> list[ResidentTenant]:
    """All modules in memory, by way of their native files as the runtime loads them. memory: default address space."""
    arena = Arena(backbone.config, backbone.fingerprint, model.dtype, _ARENA_BYTES, memory=memory)
    resident = []
    for module in modules:
        data = write_tenant(module)
        path = folder / hashlib.sha256(data).hexdigest()
        path.write_bytes(data)
        reservation = arena.reserve(parse_header(data), path.name)
        assert reservation is not None, f"{_ARENA_BYTES} bytes of address space are too few for this benchmark"
        resident.append(arena.fill(reservation, path))
    return resident


def lora_modules(peft_model: Any, num_tenants: int, backbone: Backbone, folder: Path) -> list[TenantModule]:
    """The adapters of a PEFT model, saved as PEFT saves them and read as any PEFT folder is."""
    peft_model.save_pretrained(folder)
    return [read_tenant(folder / adapter_name(t), backbone) for t in range(num_tenants)]


def with_self_tests(modules: Sequence[TenantModule], requests: Requests, expected: Tensor) -> list[TenantModule]:
    """Each module with one request and its independent answer [N, D], so that loading it computes no other one."""
    tests: dict[int, tuple[SelfTest]] = {}
    for ids, t, answer in zip(requests.token_ids, requests.tenants, expected, strict=True):
        token_ids = torch.tensor(ids)
        tests[t] = (SelfTest(token_ids=token_ids, type_ids=torch.zeros_like(token_ids), expected=answer),)
    return [replace(module, self_tests=tests[t]) for t, module in enumerate(modules)]


def random_loras(backbone: Backbone, num_tenants: int, *, seed: int) -> list[TenantModule]:
    """Random embedding tenants with LoRA, r 8 on query and value."""
    factory = _Sized(backbone, seed)
    return [_embedding_tenant(factory, "lora") for _ in range(num_tenants)]


def random_adapters(backbone: Backbone, num_tenants: int, *, seed: int) -> list[TenantModule]:
    """Random embedding tenants with Pfeiffer adapters, a bottleneck of 64."""
    factory = _Sized(backbone, seed, bottleneck=64)
    return [_embedding_tenant(factory, "pfeiffer") for _ in range(num_tenants)]


def mixed_modules(backbone: Backbone, num_tenants: int, *, seed: int) -> list[TenantModule]:
    """Random embedding tenants of every kind in turn."""
    factory = _Sized(backbone, seed)
    return [_embedding_tenant(factory, MIX[t % len(MIX)]) for t in range(num_tenants)]


def _embedding_tenant(factory: Factory, kind: str) -> TenantModule:
    return TenantModule(
        backbone_fingerprint=factory.backbone.fingerprint,
        deltas=tuple(getattr(factory, kind)()),
        head=factory.backbone.embed_head,
        source={"format": "benchmark", "kind": kind},
    )


class _Sized(Factory):
    """The tests' random tenants in the sizes of the papers, and gentle enough for twelve layers."""

    def __init__(self, backbone: Backbone, seed: int, bottleneck: int = 0) -> None:
        super().__init__(backbone, seed)
        self._bottleneck = bottleneck or backbone.config.hidden_size // 16

    def normal(self, *shape: int, std: float = 0.3, mean: float = 0.0) -> Tensor:
        return super().normal(*shape, std=std / 10, mean=mean)

    def low_rank(self, sites: Any, rank: int) -> Any:
        return super().low_rank(sites, 8)  # type: ignore[no-untyped-call]

    def bottleneck(self, taps: str, subs: Any = ("attn", "ffn"), size: int = 5, activation: str = "relu") -> Any:
        return super().bottleneck(taps, subs, self._bottleneck, activation)  # type: ignore[no-untyped-call]
