"""Fully fine-tuned models as tenants among the others: each its own answers, whatever runs beside it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from runtime.errors import ModuleTooLarge
from runtime.policies.instances import INSTANCE_POLICIES
from runtime.policies.named import Instances, batch_policy
from tests.formats.test_compressed import fine_tuned, low_rank
from tests.serving.helpers import Dense, add, outcome
from tests.tiny import TEXTS
from vbert.checkpoint import write_tenant

CLOSE = {"atol": 2e-4, "rtol": 2e-3}
MIB = 2**20


@pytest.fixture
def modules(factory):
    kinds = ("whole", "lora", "whole", "bitfit", "whole", "none", "houlsby")
    return {f"t{i}-{kind}": factory.tenant(kind) for i, kind in enumerate(kinds)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lanes": ("none",)},
        {"word_rows": "mapped"},
        {"sequence_store_bytes": MIB},
        {"host_budget_bytes": 8 * MIB},
        {"max_batch_tokens": 16},
    ],
    ids=str,
)
async def test_everybody_has_its_own_answers(serving, backbone, modules, options):
    dense = Dense(backbone)
    async with serving(**options) as engine:
        for tenant, module in modules.items():
            await add(engine, tenant, module)
        for _ in range(3):
            asked = [engine.classify(tenant, TEXTS[:3]) for tenant in modules]
            answers = await asyncio.gather(*asked, engine.embed("tiny", TEXTS[:3]))
            for answer, module in zip(answers, modules.values(), strict=False):
                np.testing.assert_allclose(answer.probabilities, dense.probabilities(module, TEXTS[:3]), **CLOSE)
            np.testing.assert_allclose(answers[-1].embeddings, np.stack(dense.raw(None, TEXTS[:3])), **CLOSE)
        assert engine.snapshot().reruns == 0
        assert engine.snapshot().resident_bytes["weights"] > 0


@pytest.mark.parametrize("policy", INSTANCE_POLICIES)
async def test_policies_for_instances_serve(serving, backbone, modules, policy):
    dense = Dense(backbone)
    async with serving(policy=batch_policy(policy, instances=Instances(count=2)), max_batch_tokens=32) as engine:
        for tenant, module in modules.items():
            await add(engine, tenant, module)
        asked = [engine.classify(tenant, TEXTS[:3]) for _ in range(3) for tenant in modules]
        answers = await asyncio.gather(*asked, engine.embed("tiny", TEXTS[:3]))
        for answer, module in zip(answers, list(modules.values()) * 3, strict=False):
            np.testing.assert_allclose(answer.probabilities, dense.probabilities(module, TEXTS[:3]), **CLOSE)
        snapshot = engine.snapshot()
        assert snapshot.resident_modules <= 2
        assert snapshot.reruns == 0
        assert snapshot.evictions >= len(modules) - 2
        assert snapshot.evictions == len(modules) - 2 or policy != "kind-batches"
        leaves = asyncio.create_task(engine.classify("t0-whole", TEXTS[:3]))
        await asyncio.sleep(0)
        leaves.cancel()
        await asyncio.gather(*(engine.classify(tenant, TEXTS[:1]) for tenant in modules))


async def test_a_change_of_weights_gives_the_same_bits_as_a_fresh_start(serving, factory):
    """Room for one of two: each load of the other one swaps it out, and what comes back answers as before."""
    modules = {name: factory.tenant("whole") for name in ("a", "b")}
    async with serving(max_batch_tokens=64) as engine:
        await add(engine, "a", modules["a"])
        await engine.classify("a", TEXTS[:2])  # beside its self-tests, which are another batch
        fresh = (await engine.classify("a", TEXTS[:2])).probabilities
        size = engine.snapshot().resident_bytes["weights"] * 3 // 2
    async with serving(module_budget_bytes=size) as engine:
        for name, module in modules.items():
            await add(engine, name, module)
            await engine.classify(name, TEXTS[:2])
        for _ in range(4):
            again = (await engine.classify("a", TEXTS[:2])).probabilities
            assert np.array_equal(again, fresh)
            assert not np.allclose((await engine.classify("b", TEXTS[:2])).probabilities, fresh)
        assert engine.snapshot().evictions >= 7


async def test_same_weights_are_loaded_once(serving, factory):
    async with serving() as engine:
        await add(engine, "a", factory.tenant("whole"))
        for _ in range(5):
            await asyncio.gather(*(engine.classify("a", [text]) for text in TEXTS))
        assert engine.snapshot().loads == {"ok": 1}


async def test_one_that_never_fits_is_refused_and_the_others_are_served(serving, factory):
    async with serving(module_budget_bytes=MIB // 16) as engine:
        await add(engine, "small", factory.tenant("bitfit"))
        error = await outcome(engine.add_tenant("large", write_tenant(factory.tenant("whole"))))
        if not isinstance(error, ModuleTooLarge):
            error = await outcome(engine.classify("large", TEXTS[:1]))
        assert isinstance(error, ModuleTooLarge)
        assert (await engine.classify("small", TEXTS[:1])).tenant == "small"


async def test_a_folder_of_transformers_is_a_tenant_like_any_other(serving, backbone, tmp_path):
    """Added as it is; its self-tests hold what `transformers` itself answers."""
    import torch
    import transformers

    folder = fine_tuned(backbone, tmp_path / "whole", low_rank)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    (encoded,) = Dense(backbone).tokenizer.encode(["one text"])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([encoded.token_ids])).logits.softmax(-1).numpy()
    async with serving() as engine:
        version = await engine.add_tenant("whole", folder)
        assert version.kinds == ("weights",)
        answer = await engine.classify("whole", ["one text"])
    np.testing.assert_allclose(answer.probabilities, expected, **CLOSE)
