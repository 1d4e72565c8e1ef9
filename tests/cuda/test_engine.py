"""The engine on a real device: what is kept in pinned memory and comes back are the states that the device computed."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from runtime import Engine, EngineConfig
from tests.random_tenants import Factory
from tests.serving.helpers import Dense, add
from tests.tiny import TEXTS, tiny_backbone
from vbert.formats.transformers_folder import read_backbone

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("lanes", [("rows", "modules", "compute"), ("none",)])
@pytest.mark.parametrize("word_rows", ["memory", "mapped"])
def test_texts_that_come_again(tmp_path, lanes, word_rows):
    asyncio.run(_texts_that_come_again(tmp_path, lanes, word_rows))  # the suite's machine has no plug-ins


async def _texts_that_come_again(tmp_path, lanes, word_rows):
    backbone = read_backbone(tiny_backbone("bert", tmp_path / "backbone", num_layers=4))
    dense, factory = Dense(backbone), Factory(backbone, seed=1)
    low, module = factory.tenant("lora"), factory.tenant("houlsby")
    up = replace(module, deltas=tuple(d for d in module.deltas if d.layer >= 2))
    config = EngineConfig(
        backbone=str(backbone.folder),
        store=str(tmp_path / "store"),
        device="cuda",
        dtype="float32",
        sequence_store_bytes=2**20,
        lanes=lanes,
        word_rows=word_rows,
    )
    async with Engine(config) as engine:
        await add(engine, "low", low)
        await add(engine, "up", up)
        for texts in (TEXTS[:3], TEXTS, TEXTS[1:]):
            for name, tenant in (("up", up), ("low", low)):
                answer = await engine.classify(name, texts)
                want = dense.probabilities(tenant, texts)
                np.testing.assert_allclose(answer.probabilities, want, rtol=0, atol=1e-4)
        seen = engine.snapshot()
        assert seen.reruns == 0
        assert seen.sequences["hits"] > len(TEXTS)
