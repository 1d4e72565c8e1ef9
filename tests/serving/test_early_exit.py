"""Early exit, served: who says how sure is sure enough, what is told, and what never leaves."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from runtime.exit_rules import ExitRules
from tests.random_tenants import Factory
from tests.serving.helpers import Dense, add, softmax
from tests.tiny import TEXTS
from tests.tolerances import assert_answer
from vbert.errors import BadRequest, ConfigError, SelfTestFailed
from vbert.reference import dense_forward
from vbert.tenant import SelfTest

CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def dense(backbone):
    return Dense(backbone)


@pytest.fixture
def leaving(backbone):
    """A tenant whose answers leave before layer 1 by its file."""
    factory = Factory(backbone, seed=21)
    return factory.with_exits(factory.tenant("lora", num_labels=2), 1, threshold=0.0)


def probabilities(dense, module, exit_layer):
    encoded = dense.tokenizer.encode(TEXTS)
    raw = [dense_forward(dense.backbone, module, e.token_ids, e.type_ids, "plain", exit_layer) for e in encoded]
    return softmax(torch.stack(raw).numpy())


async def test_leaving_early_in_bfloat16(serving, dense, leaving):
    early, late = probabilities(dense, leaving, 1), probabilities(dense, leaving, 0)
    async with serving(dtype="bfloat16") as engine:
        await add(engine, "t", leaving)
        answer = await engine.classify("t", TEXTS, exit_threshold=float(np.median(early.max(1))))
    assert {*answer.exits} == {1, None}
    wanted = np.where(np.array([exit_ == 1 for exit_ in answer.exits])[:, None], early, late)
    assert_answer(torch.from_numpy(answer.probabilities), torch.from_numpy(wanted), torch.bfloat16)


async def test_the_file_the_operator_and_the_request_say_how_sure(serving, dense, leaving):
    early, late = probabilities(dense, leaving, 1), probabilities(dense, leaving, 0)
    async with serving(exit_thresholds=("never.*=1",)) as engine:
        for name in ("acme.a", "never.b"):
            await add(engine, name, leaving)
        own = await engine.classify("acme.a", TEXTS)
        np.testing.assert_allclose(own.probabilities, early, **CLOSE)
        assert own.exits == (1,) * len(TEXTS)
        told = await engine.classify("never.b", TEXTS)
        np.testing.assert_allclose(told.probabilities, late, **CLOSE)
        assert told.exits == (None,) * len(TEXTS)
        with pytest.raises(BadRequest, match="the operator lets no answer"):
            await engine.classify("never.b", TEXTS, exit_threshold=0.0)
        assert (await engine.classify("never.b", TEXTS, exit_threshold=1)).exits == told.exits
        middle = float(np.median(early.max(1)))
        some = await engine.classify("acme.a", TEXTS, exit_threshold=middle)
        leaves = early.max(1) > middle
        assert some.exits == tuple(1 if left else None for left in leaves)
        np.testing.assert_allclose(some.probabilities, np.where(leaves[:, None], early, late), **CLOSE)
        assert engine.snapshot().exits == {1: len(TEXTS) + int(leaves.sum())}


async def test_tenants_with_and_without_exits_share_batches(serving, factory, dense, leaving):
    plain = factory.tenant("houlsby", num_labels=3)
    async with serving() as engine:
        await add(engine, "acme.a", leaving)
        await add(engine, "acme.b", plain)
        both = [engine.classify(name, [text]) for text in TEXTS for name in ("acme.a", "acme.b")]
        answers = await asyncio.gather(*both)
        a = np.concatenate([answer.probabilities for answer in answers[::2]])
        b = np.concatenate([answer.probabilities for answer in answers[1::2]])
        np.testing.assert_allclose(a, probabilities(dense, leaving, 1), **CLOSE)
        np.testing.assert_allclose(b, dense.probabilities(plain, TEXTS), **CLOSE)
        assert {answer.exits for answer in answers[1::2]} == {(None,)}


async def test_only_classify_leaves_early(serving, dense, leaving):
    pairs = [("the cat", text) for text in TEXTS]
    async with serving() as engine:
        await add(engine, "acme.a", leaving)
        scores = (await engine.score("acme.a", pairs)).scores
        np.testing.assert_allclose(scores, dense.probabilities(leaving, pairs)[:, 1], **CLOSE)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, "much", True])
async def test_a_confidence_is_a_number_from_0_to_1(serving, leaving, threshold):
    async with serving() as engine:
        await add(engine, "acme.a", leaving)
        with pytest.raises(BadRequest, match="from 0 to 1"):
            await engine.classify("acme.a", TEXTS, exit_threshold=threshold)


async def test_a_tenant_without_exits_is_told(serving, factory):
    async with serving() as engine:
        await add(engine, "acme.b", factory.tenant("lora"))
        with pytest.raises(BadRequest, match="has no exits to leave by"):
            await engine.classify("acme.b", TEXTS, exit_threshold=0.5)


@pytest.mark.parametrize("rule", ["acme.*", "acme.*=", "=0.5", "acme.*=much", "acme.*=2"])
def test_a_rule_that_is_none_is_refused(rule):
    with pytest.raises(ConfigError, match="exit_thresholds has"):
        ExitRules((rule,))


@pytest.mark.parametrize("exit_layer", [0, 1])
async def test_an_exit_has_self_tests_of_its_own(serving, dense, leaving, exit_layer):
    (e,) = dense.tokenizer.encode(TEXTS[:1])
    of = {"token_ids": torch.tensor(e.token_ids), "type_ids": torch.tensor(e.type_ids)}
    right = {i: dense_forward(dense.backbone, leaving, *of.values(), "plain", i) for i in (0, 1)}
    tests = [SelfTest(**of, expected=right[i] + (i == exit_layer), exit=i) for i in (0, 1)]
    async with serving() as engine:
        with pytest.raises(SelfTestFailed):
            await _served(engine, replace(leaving, self_tests=tuple(tests)))


async def _served(engine, module):
    await add(engine, "acme.a", module)
    return await engine.classify("acme.a", TEXTS)


async def test_stored_lower_layers_take_an_answer_to_the_same_exit(serving, backbone, dense):
    factory = Factory(backbone, seed=22)
    module = factory.tenant("lora", num_labels=2)
    high = replace(module, deltas=tuple(d for d in module.deltas if d.layer >= 1))
    leaving = factory.with_exits(high, 1, threshold=0.0)
    want = probabilities(dense, leaving, 1)
    async with serving(sequence_store_bytes=2**20, sequence_layer=1) as engine:
        await add(engine, "acme.a", leaving)
        paths = set()
        async with asyncio.timeout(20):
            while paths != {"stored"}:  # states are kept after the answer is out
                answer = await engine.classify("acme.a", TEXTS)
                np.testing.assert_allclose(answer.probabilities, want, **CLOSE)
                assert answer.exits == (1,) * len(TEXTS)
                paths = {*answer.paths}
