"""The engine on a real device: what is kept in pinned memory and comes back are the states that the device computed,
and every way through the lower layers gives its own answer."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from runtime import Engine, EngineConfig
from tests.ngram.test_local_layers import random_student
from tests.random_tenants import Factory
from tests.serving.helpers import Dense, add, softmax
from tests.serving.skip_world import World
from tests.tiny import TEXTS, tiny_backbone
from training.export_skip import write_folder
from vbert.formats.transformers_folder import read_backbone
from vbert.reference import dense_forward

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


@pytest.mark.parametrize("lanes", [("rows", "modules", "compute"), ("none",)])
def test_every_path_of_a_skip_backbone(tmp_path, lanes):
    asyncio.run(_every_path_of_a_skip_backbone(tmp_path, lanes))


async def _every_path_of_a_skip_backbone(tmp_path, lanes):
    """Looked up, computed, kept and computed again, beside the plain way and texts that leave early."""
    source = read_backbone(tiny_backbone("bert", tmp_path / "plain", num_layers=3))
    write_folder(tmp_path / "skip", random_student(source), source, plain_way=True, name="tiny-skip")
    world = World(read_backbone(tmp_path / "skip"), tmp_path)
    module = world.tenant(1)
    leaving = Factory(world.backbone, seed=2).with_exits(world.tenant(2, "plain"), 2, threshold=0.0)
    config = EngineConfig(
        backbone=str(world.backbone.folder),
        store=str(tmp_path / "store"),
        device="cuda",
        dtype="float32",
        ngrams=(world.table(world.keys(TEXTS[:3])),),
        ngram_cache_bytes=2**20,
        lanes=lanes,
    )
    async with Engine(config) as engine:
        await add(engine, "t", module)
        await add(engine, "early", leaving)
        for _ in range(3):
            paths = ("plain", "exact", "compute")
            asked = [engine.classify("t", TEXTS, path=path) for path in paths]
            *answers, left, backed_off = await asyncio.gather(
                *asked, engine.classify("early", TEXTS), engine.classify("t", TEXTS[:3], path="backoff")
            )
            for path, answer in zip(paths, answers, strict=True):
                assert {*answer.paths} == {path}
                for text, got in zip(TEXTS, answer.probabilities, strict=True):
                    want = world.expected(module, text, "exact" if path == "compute" else path)
                    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)  # rows of tables are float16
            for text, got in zip(TEXTS[:3], backed_off.probabilities, strict=True):  # all of its n-grams are stored
                np.testing.assert_allclose(got, world.expected(module, text, "exact"), rtol=0, atol=1e-3)
            assert left.exits == (2,) * len(TEXTS)
            for text, got in zip(TEXTS, left.probabilities, strict=True):
                (e,) = world.tokenizer.encode([text])
                want = softmax(dense_forward(world.backbone, leaving, e.token_ids, e.type_ids, "plain", 2).numpy())
                np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
        seen = engine.snapshot()
        assert seen.reruns == 0
        assert seen.ngrams["inserted"] > 0
