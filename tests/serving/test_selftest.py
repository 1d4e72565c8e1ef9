"""Known answers: made by the dense reference, kept as bytes, compared within the tolerance of the dtype."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.serving.helpers import Dense, add
from tests.tiny import TEXTS
from vbert.errors import CorruptFile, SelfTestFailed
from vbert.selftest import TOLERANCES, check_outputs, dump_self_tests, load_self_tests, make_self_tests


@pytest.fixture
def tests(backbone, factory):
    return make_self_tests(backbone, factory.tenant("lora", head="token_classify"), Dense(backbone).tokenizer)


def test_they_survive_being_kept(tests):
    kept = load_self_tests(dump_self_tests(tests))
    for a, b in zip(tests, kept, strict=True):
        for part in ("token_ids", "type_ids", "expected"):
            assert torch.equal(getattr(a, part), getattr(b, part))


@pytest.mark.parametrize("data", [b"", b"nonsense" * 100])
def test_damaged_ones_are_named(data):
    with pytest.raises(CorruptFile, match="self-tests"):
        load_self_tests(data)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_tolerance_is_that_of_the_dtype(tests, dtype):
    outputs = [test.expected.clone() for test in tests]
    limit = TOLERANCES[dtype].absolute + TOLERANCES[dtype].relative * float(tests[0].expected.abs().max())
    outputs[0][0, 0] += 0.9 * limit
    check_outputs(tests, outputs, dtype)
    outputs[0][0, 0] += 0.2 * limit
    with pytest.raises(SelfTestFailed, match="self-test 0 is off"):
        check_outputs(tests, outputs, dtype)


def test_other_shapes_and_other_than_finite_numbers_fail(tests):
    outputs = [test.expected.clone() for test in tests]
    with pytest.raises(SelfTestFailed, match="stored are"):
        check_outputs(tests, [outputs[0][:1], *outputs[1:]], torch.float32)
    outputs[2][0, 0] = float("nan")
    with pytest.raises(SelfTestFailed, match="off by nan"):
        check_outputs(tests, outputs, torch.float32)


async def test_bfloat16_is_served_within_its_tolerance(serving, factory, backbone):
    """Gentle weights: what the tolerance is for. The load itself replays the self-tests in bfloat16."""
    module = factory.tenant("lora")
    module = replace(module, deltas=tuple(replace(d, b=d.b * 0.05) for d in module.deltas))
    async with serving(dtype="bfloat16") as engine:
        assert engine.dtype == "bfloat16"
        await add(engine, "t", module)
        answer = await engine.classify("t", TEXTS)
        embedded = (await engine.embed("tiny", TEXTS)).embeddings
    dense = Dense(backbone)
    np.testing.assert_allclose(answer.probabilities, dense.probabilities(module, TEXTS), rtol=0, atol=0.05)
    assert ((embedded * np.stack(dense.raw(None, TEXTS))).sum(1) > 0.999).all()
