"""Tenants on a skip backbone: whichever path a text takes, it is one of its tenant's, and the answer is that path's."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.ngram.test_local_layers import random_student
from tests.random_tenants import Factory
from tests.serving.helpers import add, softmax
from tests.serving.skip_world import World
from tests.tiny import TEXTS
from tests.tolerances import assert_answer
from training.export_skip import write_folder
from vbert.errors import BadRequest, SelfTestFailed, WrongBackbone
from vbert.formats.transformers_folder import read_backbone
from vbert.ngram.index import shortened
from vbert.ngram.table import NgramTable
from vbert.reference import dense_forward
from vbert.tenant import SelfTest
from vbert.tokenizer import Tokenizer

CLOSE = {"rtol": 0, "atol": 1e-3}  # rows of tables are float16


async def test_each_path_gives_its_own_answer(world, on_skip):
    modules = {f"t{i}": world.tenant(i) for i in range(3)}
    table = world.table(world.keys(TEXTS[:3]))
    async with on_skip(ngrams=(table,)) as engine:
        for name, module in modules.items():
            await add(engine, name, module)
        ways = [path for path in (*world.paths, "compute") if path != "backoff"]
        asked = [(name, path) for name in modules for path in ways]
        answers = await asyncio.gather(*(engine.classify(name, list(TEXTS), path=path) for name, path in asked))
        for (name, path), answer in zip(asked, answers, strict=True):
            assert answer.paths == (path,) * len(TEXTS)
            for text, got in zip(TEXTS, answer.probabilities, strict=True):
                wanted = world.expected(modules[name], text, "exact" if path == "compute" else path)
                np.testing.assert_allclose(got, wanted, **CLOSE)


async def test_paths_of_a_batch_do_not_mix(world, on_skip):
    """Every sequence of one batch takes another path, in any order."""
    module = world.tenant(0)
    async with on_skip(ngrams=(world.table(world.keys(TEXTS)),)) as engine:
        await add(engine, "t", module)
        ways = [path for path in (*world.paths, "compute") if path != "backoff"] * 3
        answers = await asyncio.gather(
            *(engine.classify("t", [text], path=path) for text, path in zip(TEXTS, ways, strict=False))
        )
        for text, path, answer in zip(TEXTS, ways, answers, strict=False):
            wanted = world.expected(module, text, "exact" if path == "compute" else path)
            np.testing.assert_allclose(answer.probabilities[0], wanted, **CLOSE)


async def test_each_path_in_bfloat16(world, on_skip):
    """Whatever is stored or computed, in batches of one path and of all, next to float32 references."""
    module, stores = world.tenant(0), {"ngrams": (world.table(world.keys(TEXTS[:4])),), "ngram_cache_bytes": 2**20}
    if "plain" in world.paths:
        stores["sequence_store_bytes"] = 2**20
    wanted = {path: [world.expected(module, text, path) for text in TEXTS] for path in world.paths if path != "backoff"}
    wanted |= {"compute": wanted["exact"]} | ({"stored": wanted["plain"]} if "plain" in wanted else {})
    ways = [path for path in wanted if path != "stored"]
    async with on_skip(dtype="bfloat16", **stores) as engine:
        await add(engine, "t", module)
        taken = set()
        for _ in range(3):  # computed, kept, looked up
            alone = [await engine.classify("t", list(TEXTS), path=path) for path in ways]
            mixed = await asyncio.gather(*(engine.classify("t", list(TEXTS), path=path) for path in ways))
            for answer in (*alone, *mixed):
                for i, (path, got) in enumerate(zip(answer.paths, answer.probabilities, strict=True)):
                    assert_answer(torch.from_numpy(got), torch.from_numpy(wanted[path][i]), torch.bfloat16)
                taken |= {*answer.paths}
    assert taken == {*wanted}


async def test_two_backbones_in_one_process_serve_each_their_own_tenants(world, on_skip, serving, tmp_path):
    """Where the folder has no plain way, its teacher is another backbone."""
    plain = read_backbone(world.backbone.folder.parent / "plain")
    theirs = Factory(plain, seed=5).tenant("lora_all", head="classify")
    ours = world.tenant(1)
    table, store = world.table(world.keys(TEXTS)), str(tmp_path / "plain-store")
    async with on_skip(ngrams=(table,)) as skips, serving(backbone=str(plain.folder), store=store) as every_layer:
        await add(skips, "t", ours)
        await add(every_layer, "t", theirs)
        asked = [engine.classify("t", [text]) for text in TEXTS for engine in (skips, every_layer)]
        answers = await asyncio.gather(*asked)
        tokenizer = Tokenizer.load(plain.folder, plain.config)
        for text, skipped, full in zip(TEXTS, answers[::2], answers[1::2], strict=True):
            assert (skipped.paths, full.paths) == (("exact",), ("plain",))
            np.testing.assert_allclose(skipped.probabilities[0], world.expected(ours, text, "exact"), **CLOSE)
            (e,) = tokenizer.encode([text], offsets=False)
            wanted = softmax(dense_forward(plain, theirs, e.token_ids, e.type_ids).numpy())
            np.testing.assert_allclose(full.probabilities[0], wanted, **CLOSE)
        with pytest.raises(WrongBackbone):
            await add(every_layer, "other", world.tenant(2, "exact"))


async def test_backoff_takes_the_longest_n_gram_that_is_stored(world, on_skip):
    """Against a model of the same backbone whose n-grams are shortened as the table has them."""
    module, text = world.tenant(1), TEXTS[1]
    keys = world.keys([text])
    n = len(keys)
    stored = np.concatenate([keys[: n // 3], shortened(keys[: 2 * n // 3], 2), shortened(keys, 1)[:-1]])
    table = world.table(stored)
    _, kept = NgramTable(table, world.backbone.skip.base).look_up(keys, 1)
    assert {*kept.tolist()} == {0, 1, 2, 3}
    async with on_skip(ngrams=(table,)) as engine:
        await add(engine, "t", module)
        answer = await engine.classify("t", [text], path="backoff")
        assert answer.paths == ("backoff",)
        got = (await engine.classify("t", [text], path="backoff")).probabilities[0]
        counted = engine.snapshot().ngrams
    assert counted["trigrams"] == 2 * int((kept == 3).sum())
    assert counted["nothing"] == 2
    np.testing.assert_allclose(got, await _backed_off(world, module, text, keys, kept), **CLOSE)


async def _backed_off(world, module, text, keys, kept):
    """The dense reference on rows that are put together here, one n-gram after the other."""
    from vbert.reference import _head, _layer, _layer_weights, merge

    config, n = world.backbone.config, len(keys)
    merged = torch.zeros(n, config.hidden_size)
    for i in range(n):
        if not kept[i]:
            continue
        u = world.model.local.encode(shortened(keys[i : i + 1], int(kept[i])))[0]
        merged[i] += u[1]
        if i:
            merged[i - 1] += u[0]
        if i + 1 < n:
            merged[i + 1] += u[2]
    weights = world.backbone.skip.weights
    hidden = merged + weights["merge.position_embeddings"][:n] + weights["merge.type_embeddings"][0]
    hidden = torch.nn.functional.layer_norm(
        hidden, hidden.shape[1:], weights["merge.norm.weight"], weights["merge.norm.bias"], config.layer_norm_eps
    )
    tuned = merge(world.backbone.weights, module.deltas)
    for i in range(world.backbone.skip.config.first_layer, config.num_layers):
        hidden = _layer(config, _layer_weights(tuned, i), [], hidden, 0.0)
    return softmax(_head(module.head, hidden, world.backbone.weights).numpy())


async def test_auto_takes_the_cheapest_path_by_a_texts_own_n_grams(world, on_skip):
    known, near, unknown = TEXTS[1], TEXTS[5], TEXTS[2]
    keys = world.keys([near])
    table = world.table(np.concatenate([world.keys([known]), keys[: 2 * len(keys) // 3], shortened(keys, 1)]))
    dear = "plain" if "plain" in world.paths else "exact"
    async with on_skip(ngrams=(table,)) as engine:
        await add(engine, "all", world.tenant(0))
        await add(engine, "exact", world.tenant(1, "exact"))
        answers = await asyncio.gather(
            engine.classify("all", [known, near, unknown]),
            engine.classify("exact", [known, near, unknown]),
            engine.classify("all", [unknown, known, near]),
        )
        assert answers[0].paths == ("exact", "backoff", dear)
        assert answers[1].paths == ("exact", "exact", "exact")
        assert answers[2].paths == (dear, "exact", "backoff")
        if "plain" in world.paths:
            await add(engine, "two", world.tenant(2, "plain", "exact"))
            assert (await engine.classify("two", [known, unknown])).paths == ("exact", "plain")
            assert (await engine.embed(engine.name, [known])).paths == ("plain",)
        else:
            assert (await engine.embed(engine.name, [known])).paths == ("exact",)


async def test_a_tenant_takes_only_paths_it_was_trained_for(world, on_skip):
    async with on_skip() as engine:
        await add(engine, "exact", world.tenant(1, "exact"))
        with pytest.raises(BadRequest, match="can take exact, compute"):
            await engine.classify("exact", ["hello"], path="backoff")
        with pytest.raises(BadRequest, match="path is 'fast'"):
            await engine.classify("exact", ["hello"], path="fast")
        assert (await engine.classify("exact", ["hello"], path="auto")).paths == ("exact",)


async def test_rules_fix_the_path_of_tenants(world, on_skip):
    async with on_skip(paths=("acme.*=compute",)) as engine:
        await add(engine, "acme.x", world.tenant(1))
        await add(engine, "bank", world.tenant(1))
        for asked in (None, "auto", "compute"):
            assert (await engine.classify("acme.x", ["hello"], path=asked)).paths == ("compute",)
        with pytest.raises(BadRequest, match=r"the operator fixed compute for 'acme\.x'; leave path out"):
            await engine.classify("acme.x", ["hello"], path="exact")
        assert (await engine.classify("bank", ["hello"], path="exact")).paths == ("exact",)
        await add(engine, "acme.plain", world.tenant(1, "backoff"))
        with pytest.raises(BadRequest, match="no n-gram table is served"):
            await engine.classify("acme.plain", ["hello"])


async def test_a_rule_that_a_tenant_cannot_follow_is_the_operators_to_mend(world, on_skip):
    async with on_skip(paths=("acme.*=backoff",)) as engine:
        await add(engine, "acme.x", world.tenant(1, "exact"))
        with pytest.raises(BadRequest, match="which can take exact, compute; only the server's option --paths"):
            await engine.classify("acme.x", ["hello"])


async def test_without_a_table_nobody_backs_off(world, on_skip):
    """Else all texts of one length would have the same answer."""
    async with on_skip() as engine:
        await add(engine, "t", world.tenant(1))
        assert "backoff" not in (await engine.classify("t", list(TEXTS))).paths
        with pytest.raises(BadRequest, match="path is 'backoff'"):
            await engine.classify("t", ["hello"], path="backoff")


async def test_self_tests_of_paths_that_are_not_here_are_left_out(world, on_skip, serving, tmp_path):
    """A tenant trained for all paths, with a self-test of each, on the plain backbone alone."""
    if "plain" not in world.paths:
        return
    module, ids = world.tenant(1), torch.tensor([5, 6, 7, 8])
    tests = tuple(
        SelfTest(
            token_ids=ids,
            type_ids=ids * 0,
            expected=dense_forward(world.backbone, module, ids, ids * 0, path),
            path=path,
        )
        for path in module.paths
    )
    async with on_skip() as engine:
        await add(engine, "t", replace(module, self_tests=tests))
        assert (await engine.classify("t", ["hello"], path="exact")).paths == ("exact",)
        wrong = replace(tests[1], expected=tests[1].expected + 1)
        await add(engine, "wrong", replace(module, self_tests=(tests[0], wrong, tests[2])))
        with pytest.raises(SelfTestFailed):
            await engine.classify("wrong", ["hello"], path="plain")
        await add(engine, "few", replace(module, self_tests=(tests[0],)))  # the others are made
        assert (await engine.classify("few", ["hello"], path="exact")).paths == ("exact",)
    plain = str(world.backbone.folder.parent / "plain")
    async with serving(backbone=plain, store=str(tmp_path / "plain-store")) as engine:
        await add(engine, "t", replace(module, self_tests=tests))
        assert (await engine.classify("t", ["hello"])).paths == ("plain",)


async def test_a_tenant_of_another_skip_part_goes_the_plain_way_or_none(world, on_skip, tmp_path):
    source = read_backbone(world.backbone.folder.parent / "plain")
    plain_way = "plain" in world.paths
    write_folder(tmp_path / "other", random_student(source, seed=9), source, plain_way=plain_way, name="other")
    other = World(read_backbone(tmp_path / "other"), tmp_path)
    async with on_skip() as engine:
        if plain_way:
            await add(engine, "both", other.tenant(1))
            assert (await engine.classify("both", ["hello"])).paths == ("plain",)
        with pytest.raises(WrongBackbone):
            await add(engine, "exact", other.tenant(1, "exact"))
        with pytest.raises(WrongBackbone, match="path plain" if not plain_way else "made for backbone"):
            await add(
                engine,
                "wrong",
                replace(
                    other.tenant(1, "exact"),
                    paths=("plain",),
                    backbone_fingerprint=world.backbone.fingerprint if not plain_way else "sha256:x",
                ),
            )


async def test_a_failed_batch_is_computed_again_by_the_same_paths(world, on_skip, monkeypatch):
    modules = {"a": world.tenant(1), "b": world.tenant(2, "backoff")}
    table = world.table(np.concatenate([world.keys(TEXTS), shortened(world.keys(TEXTS), 1)]))
    async with on_skip(ngrams=(table,), ngram_cache_bytes=2**20) as engine:
        for name, module in modules.items():
            await add(engine, name, module)
        before = await asyncio.gather(*(engine.classify(name, [TEXTS[3]]) for name in modules))
        forwards = engine._core._forwards
        launch, failed = forwards._model.launch, []

        def fail_once(batch, feed=None):
            finish = launch(batch, feed)
            if failed:
                return finish
            failed.append(True)
            return lambda: [output * float("nan") for output in finish()]

        monkeypatch.setattr(forwards._model, "launch", fail_once)
        dropped = []
        monkeypatch.setattr(engine._core.parts.stores.ngrams._cache, "discard", dropped.append)
        after = await asyncio.gather(*(engine.classify(name, [TEXTS[3]]) for name in modules))
        assert failed
        assert len(dropped) == 1
        assert {*dropped[0].tolist()} == {*world.keys([TEXTS[3]]).tolist()}
        assert after[1].paths == ("backoff",)
        assert after[0].paths == (("plain",) if "plain" in world.paths else ("compute",))
        np.testing.assert_allclose(after[1].probabilities, before[1].probabilities, **CLOSE)
