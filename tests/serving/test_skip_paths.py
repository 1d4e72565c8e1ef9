"""Tenants on a skip backbone: whichever path a text takes, it is one of its tenant's, and the answer is that path's."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from runtime.paths import table_files
from tests.ngram.test_local_layers import random_student
from tests.random_tenants import Factory
from tests.serving.helpers import add, softmax, until
from tests.tiny import TEXTS, tiny_backbone
from training.export_skip import write_folder
from vbert.errors import BadRequest, ConfigError, SelfTestFailed, WrongBackbone
from vbert.formats.transformers_folder import read_backbone
from vbert.model import Model
from vbert.ngram.index import look_up, ngram_keys, shortened
from vbert.ngram.table import NgramTable, TableWriter
from vbert.reference import dense_forward
from vbert.tenant import SelfTest
from vbert.tokenizer import Tokenizer

CLOSE = {"rtol": 0, "atol": 1e-3}  # rows of tables are float16


@pytest.fixture(scope="module", params=[True, False], ids=["plain_way", "only_skips"])
def skipping(request, tmp_path_factory):
    """A skip backbone with a plain way, and one without."""
    folder = tmp_path_factory.mktemp("skipping")
    source = read_backbone(
        tiny_backbone("roberta", folder / "plain", num_layers=3, positions=130)
    )  # its padding id is 1
    write_folder(folder / "skip", random_student(source), source, plain_way=request.param, name="tiny-skip")
    return read_backbone(folder / "skip")


class World:
    """A backbone with its tokenizer, random tenants of all its paths, and tables of some of its n-grams."""

    def __init__(self, backbone, folder):
        self.backbone, self.folder = backbone, folder
        self.model = Model.load(backbone, "float32", "cpu")
        self.tokenizer = Tokenizer.load(backbone.folder, backbone.config)
        self.paths = ("plain", "exact", "backoff") if backbone.skip.config.first_layer else ("exact", "backoff")

    def tenant(self, seed, *paths):
        paths = paths or self.paths
        module = Factory(self.backbone, seed=seed).tenant("lora_all", head="classify")
        first, last = self.backbone.skip.config.first_layer, self.backbone.config.num_layers
        deltas = tuple(replace(d, layer=max(first, d.layer)) for d in module.deltas if d.layer >= first)
        assert deltas
        assert all(d.layer < last for d in deltas)
        fingerprint = self.backbone.fingerprint if "plain" in paths else self.backbone.skip.fingerprint
        return replace(
            module,
            deltas=deltas,
            paths=paths,
            skip_fingerprint=self.backbone.skip.fingerprint,
            backbone_fingerprint=fingerprint,
        )

    def keys(self, texts):
        ids = [np.array(e.token_ids) for e in self.tokenizer.encode(texts, offsets=False)]
        return ngram_keys(np.concatenate(ids), np.concatenate([[0], np.cumsum([len(i) for i in ids])]))

    def table(self, keys, name="t.ngrams", noise=0.0):
        keys = np.unique(keys)
        with TableWriter(
            self.folder / name,
            fingerprint=self.backbone.skip.base,
            keys=keys,
            counts=np.ones(len(keys), np.int64),
            width=self.backbone.config.hidden_size,
        ) as writer:
            rows = self.model.local.encode(keys)
            writer.add(rows + noise * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)))
        return str(self.folder / name)

    def expected(self, module, text, path):
        (encoded,) = self.tokenizer.encode([text], offsets=False)
        return softmax(dense_forward(self.backbone, module, encoded.token_ids, encoded.type_ids, path).numpy())


@pytest.fixture
def world(skipping, tmp_path):
    return World(skipping, tmp_path)


@pytest.fixture
def on_skip(world, serving):
    def on_skip(**changes):
        return serving(**({"backbone": str(world.backbone.folder)} | changes))

    return on_skip


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
        with pytest.raises(BadRequest, match="the operator fixed the path compute"):
            await engine.classify("acme.x", ["hello"], path="exact")
        assert (await engine.classify("bank", ["hello"], path="exact")).paths == ("exact",)
        await add(engine, "acme.plain", world.tenant(1, "backoff"))
        with pytest.raises(BadRequest, match="no n-gram table is served"):
            await engine.classify("acme.plain", ["hello"])


async def test_without_a_table_nobody_backs_off(world, on_skip):
    """Else all texts of one length would have the same answer."""
    async with on_skip() as engine:
        await add(engine, "t", world.tenant(1))
        assert "backoff" not in (await engine.classify("t", list(TEXTS))).paths
        with pytest.raises(BadRequest, match="path is 'backoff'"):
            await engine.classify("t", ["hello"], path="backoff")


async def test_who_does_not_share_has_no_part_in_the_cache(world, on_skip):
    async with on_skip(ngram_cache_bytes=2**20, sequence_sharing=("bank=own", "shop=off")) as engine:
        module = world.tenant(1, "exact")
        for name in ("bank", "shop"):
            await add(engine, name, module)
            for _ in range(3):
                await engine.classify(name, [TEXTS[1]])
        assert engine.snapshot().ngrams["inserted"] == engine.snapshot().ngrams["trigrams"] == 0


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


async def test_n_grams_are_kept_when_they_come_again(world, on_skip):
    async with on_skip(ngram_cache_bytes=2**20) as engine:
        module = world.tenant(1, "exact")
        await add(engine, "t", module)
        for i in range(4):
            await until(lambda: engine.snapshot().ngrams["inserted"] > 0 or i < 2)  # noqa: B023
            answer = await engine.classify("t", [TEXTS[1]])
            np.testing.assert_allclose(answer.probabilities[0], world.expected(module, TEXTS[1], "exact"), **CLOSE)
        counted = engine.snapshot().ngrams
        total, distinct = len(world.keys([TEXTS[1]])), len(np.unique(world.keys([TEXTS[1]])))
        assert counted["trigrams"] == 2 * total  # the first computes, the second keeps
        assert counted["inserted"] == distinct
        assert engine.snapshot().paths["exact"] == 4
        assert engine.snapshot().memory_bytes["ngrams"] > 0


async def test_a_domain_is_asked_first(world, on_skip):
    keys = world.keys([TEXTS[1]])
    general, finance = world.table(keys, "general"), world.table(keys, "finance", noise=0.5)
    files = (general, f"finance={finance}")
    async with on_skip(ngrams=files, ngram_domains=("bank.*=finance",)) as engine:
        module = world.tenant(1, "exact")
        for name in ("bank.a", "shop.a"):
            await add(engine, name, module)
        bank, shop = await asyncio.gather(*(engine.classify(n, [TEXTS[1]]) for n in ("bank.a", "shop.a")))
        wanted = world.expected(module, TEXTS[1], "exact")
        np.testing.assert_allclose(shop.probabilities[0], wanted, **CLOSE)
        assert abs(bank.probabilities[0] - wanted).max() > 0.01


async def test_with_a_sequence_store_a_text_that_came_before_takes_neither_path(world, on_skip):
    if "plain" not in world.paths:
        with pytest.raises(ConfigError, match="this backbone has none"):
            async with on_skip(sequence_store_bytes=2**20):
                pass
        return
    module, table = world.tenant(1, "plain", "exact"), world.table(world.keys([TEXTS[0]]))
    async with on_skip(sequence_store_bytes=2**20, ngrams=(table,)) as engine:
        await add(engine, "t", module)
        assert (await engine.classify("t", [TEXTS[5], TEXTS[0]])).paths == ("plain", "exact")
        await until(lambda: engine.snapshot().sequences["inserted"] == 1)
        for _ in range(2):
            assert (await engine.classify("t", [TEXTS[5], TEXTS[0]])).paths == ("stored", "exact")
        answer = await engine.classify("t", [TEXTS[5], TEXTS[5], TEXTS[0]])
        for text, got, path in zip(
            (TEXTS[5], TEXTS[5], TEXTS[0]), answer.probabilities, ("plain", "plain", "exact"), strict=True
        ):
            np.testing.assert_allclose(got, world.expected(module, text, path), **CLOSE)


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


async def test_what_does_not_belong_together_is_refused_at_the_start(world, on_skip, serving, tmp_path):
    other = World(world.backbone, tmp_path)
    keys = other.keys([TEXTS[0]])
    with TableWriter(
        tmp_path / "x",
        fingerprint="sha256:other",
        keys=np.unique(keys),
        counts=np.ones(len(np.unique(keys)), np.int64),
        width=world.backbone.config.hidden_size,
    ) as writer:
        writer.add(world.model.local.encode(np.unique(keys)))
    with pytest.raises(WrongBackbone, match="was made by backbone"):
        async with on_skip(ngrams=(str(tmp_path / "x"),)):
            pass
    with pytest.raises(ConfigError, match="has no local layers"):
        async with serving(ngram_cache_bytes=2**20):
            pass
    with pytest.raises(ConfigError, match="ngram_domains"):
        async with on_skip(ngram_domains=("a=b",)):
            pass
    assert table_files(("/a=b/c", "d=/e=f")) == {"": ["/a=b/c"], "d": ["/e=f"]}
    with pytest.raises(ConfigError, match="write FILE, or DOMAIN=FILE"):
        async with on_skip(ngrams=("=f",)):
            pass


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


def test_a_look_up_finds_what_was_written(world):
    keys = np.unique(world.keys(TEXTS))
    table = NgramTable(world.table(keys), world.backbone.skip.base)
    rows, kept = look_up(keys, table._index)
    assert (kept == 3).all()
    out = torch.empty(len(keys), 3, table.width)
    table.gather(rows, out)
    torch.testing.assert_close(out, world.model.local.encode(keys), atol=2e-3, rtol=2e-3)


async def test_a_profile_knows_what_n_grams_cost(world, on_skip, tmp_path):
    """Where it says that computing is dear, a text with a missing n-gram goes the plain way."""
    from runtime.cost import CostModel, Curve, Point
    from runtime.open_stores import _costs

    async with on_skip(profile=str(tmp_path / "profiles")) as engine:
        cost = engine._core.parts.cost
        assert cost.conditions.local_layers == world.backbone.skip.config.local_layers
        assert cost.local_s(512) >= cost.local_s(4) > 0
        await add(engine, "t", world.tenant(0))
    if "plain" not in world.paths:
        return
    for seconds, pays in ((1e-9, True), (10.0, False)):
        curve = Curve([Point(size=1, seconds=seconds, spread=0, repeats=1, threads=1)])
        costs = _costs(world.backbone.skip.config, 3, CostModel(cost.conditions, {**cost.curves, "local": curve}))
        assert costs.exact_pays(20, 1) == pays
        assert costs.exact_pays(20, 0)
