"""The worst bug is an answer computed with somebody else's module. A thousand tenants, everything at once, every answer
checked against the dense reference of the tenant and version its request was admitted for.

All labels are unique to a tenant version, so that a mix-up also shows where numbers happen to be alike.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from runtime.entities import find_entities
from runtime.versions import Upload
from tests.random_tenants import DELTA_KINDS, HEADS
from tests.serving.helpers import Dense, softmax, until
from tests.tiny import PAIRS, TEXTS
from vbert.checkpoint import write_tenant
from vbert.errors import UnknownTenant, WrongTask
from vbert.tenant import SelfTest, TenantModule

NUM_TENANTS, NUM_REQUESTS, NUM_CLIENTS = 1000, 1200, 32
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@dataclass
class World:
    """What the test knows: every version ever registered, and which one each request was admitted for."""

    factory: object
    dense: Dense
    rng: random.Random = field(default_factory=lambda: random.Random(11))
    modules: dict[tuple[str, int], TenantModule] = field(default_factory=dict)
    admitted: dict[asyncio.Task, tuple[str, int]] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    seen: Counter = field(default_factory=Counter)

    def make(self, i: int, version: int) -> TenantModule:
        """Every delta kind with every head; bottlenecks and masks also mixed with others. Most bring a self-test, as
        trained tenants do."""
        kind = DELTA_KINDS[i % len(DELTA_KINDS)]
        mixed = ("bitfit", "lora") if i % 2 and kind in ("houlsby", "pfeiffer", "parallel", "vbert", "mask") else ()
        module = self.factory.tenant(kind, *mixed, head=HEADS[(i // len(DELTA_KINDS) + version) % len(HEADS)])
        labels = tuple(f"{i}.{version}.{label}" for label in module.head.labels)
        module = replace(module, head=replace(module.head, labels=labels))
        self.modules[f"t{i}", version] = module
        return module if i % 20 == 0 else replace(module, self_tests=(self.self_test(module),))

    def self_test(self, module: TenantModule) -> SelfTest:
        encoded = self.dense.tokenizer.encode(["no"])[0]
        return SelfTest(
            token_ids=torch.tensor(encoded.token_ids),
            type_ids=torch.tensor(encoded.type_ids),
            expected=torch.from_numpy(self.dense.raw(module, ["no"])[0]),
        )

    def check(self, key: tuple[str, int], inputs, answer) -> None:
        module = self.modules[key]
        head, raw = module.head, self.dense.raw(module, inputs)
        assert (answer.tenant, answer.version) == key
        if head.kind == "embed":
            np.testing.assert_allclose(answer.embeddings, np.stack(raw), **CLOSE)
        elif head.kind == "rerank":
            np.testing.assert_allclose(answer.scores, 1 / (1 + np.exp(-np.stack(raw)[:, 0])), **CLOSE)
        elif head.kind == "classify":
            assert answer.class_labels == head.labels
            np.testing.assert_allclose(answer.probabilities, self.dense.probabilities(module, inputs), **CLOSE)
        else:
            for item, logits, entities in zip(inputs, raw, answer.entities, strict=True):
                encoded = self.dense.tokenizer.encode([item])[0]
                expected = find_entities(item, encoded, softmax(logits), head.labels)
                assert [(e.start, e.end, e.label) for e in entities] == [(e.start, e.end, e.label) for e in expected]
                np.testing.assert_allclose([e.score for e in entities], [e.score for e in expected], **CLOSE)

    async def ask(self, engine) -> None:
        """One request of a random tenant, a few of them hot; one in eight is cancelled on its way."""
        i = (
            int(self.rng.paretovariate(0.3)) % NUM_TENANTS
            if self.rng.random() < 0.5
            else self.rng.randrange(NUM_TENANTS)
        )
        kind = engine._core.parts.serves(f"t{i}").task
        inputs = self.rng.choices(PAIRS if kind == "rerank" else TEXTS, k=self.rng.choice((1, 1, 1, 3)))
        method = engine.score if kind == "rerank" else getattr(engine, kind)
        request = asyncio.create_task(method(f"t{i}", inputs, caller=f"caller{i % 7}"))
        if self.rng.random() < 0.125:
            for _ in range(self.rng.randrange(20)):
                await asyncio.sleep(0)
            request.cancel()
        try:
            answer = await request
        except asyncio.CancelledError:
            self.seen["cancelled"] += 1
        else:
            self.check(self.admitted[request], inputs, answer)
            self.seen[kind] += 1

    async def client(self, engine) -> None:
        while self.seen.total() < NUM_REQUESTS:
            try:
                await self.ask(engine)
            except UnknownTenant:
                assert self.removed  # only the operator below makes tenants disappear
                self.seen["unknown"] += 1
            except WrongTask:
                self.seen["other task meanwhile"] += 1

    async def operator(self, engine) -> None:
        """New versions, old ones activated again, tenants removed and added again, as long as requests come."""
        for done in itertools.count(1):
            await until(lambda: self.seen.total() >= 8 * done)  # noqa: B023 (awaited at once)
            if self.seen.total() >= NUM_REQUESTS:
                return
            i = self.rng.randrange(60)  # the hot ones, so that changes meet requests
            tenant = f"t{i}"
            match self.rng.choice(("new", "new", "activate", "remove")):
                case "new":
                    await self.register(engine, i)
                case "activate":
                    version = self.rng.choice(await engine.versions(tenant))
                    await engine.activate(tenant, version.version)
                    self.seen["activated"] += 1
                case "remove":
                    self.removed.add(tenant)
                    await engine.remove_tenant(tenant)
                    await self.register(engine, i)
                    self.seen["removed"] += 1

    async def register(self, engine, i: int) -> None:
        version = max(v for t, v in self.modules if t == f"t{i}") + 1
        data = write_tenant(self.make(i, version))
        assert (await engine.add_tenant(f"t{i}", data)).version == version
        self.seen["added"] += 1


@pytest.mark.slow
async def test_every_answer_is_that_of_the_tenant_and_version_resolved_at_admission(serving, factory, backbone):
    world = World(factory, Dense(backbone))
    async with serving(module_budget_bytes=60_000, max_batch_tokens=512) as engine:
        core = engine._core
        uploads = []
        for i in range(NUM_TENANTS):
            data = write_tenant(world.make(i, 1))
            uploads.append(Upload(tenant=f"t{i}", data=data, facts=core.tenants._checked(data)))
        core.parts.store.put_many(uploads)
        serves = core.dispatcher.serves

        def recorded(tenant):
            served = serves(tenant)
            world.admitted[asyncio.current_task()] = (served.key.tenant, served.key.version)
            return served

        core.dispatcher.serves = recorded
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(world.operator(engine))
            for _ in range(NUM_CLIENTS):
                tasks.create_task(world.client(engine))
        now = engine.snapshot()
        assert sum(now.resident_bytes.values()) <= 60_000
        assert now.evictions > 300
        assert now.reruns == 0
        assert set(now.loads) == {"ok"}
        assert not any(entry.pins for entry in core.manager._resident.values())
        assert (now.queue_inputs, core.dispatcher.num_open) == (0, 0)
    assert min(world.seen[what] for what in ("classify", "embed", "token_classify", "rerank", "cancelled")) > 50
    assert min(world.seen[what] for what in ("added", "activated", "removed")) > 5
