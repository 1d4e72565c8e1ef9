"""The blocking twin: the same methods and the same answers, from any thread."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from runtime import BlockingEngine, Engine
from tests.serving.helpers import Dense
from tests.tiny import TEXTS
from vbert.checkpoint import write_tenant
from vbert.errors import ConfigError, UnknownTenant


def test_it_answers_like_the_dense_reference(config, factory, backbone):
    module = factory.tenant("lora")
    with BlockingEngine(config()) as engine:
        engine.add_tenant("t", write_tenant(module))
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: engine.classify("t", TEXTS), range(16)))
        expected = Dense(backbone).probabilities(module, TEXTS)
        for answer in answers:
            np.testing.assert_allclose(answer.probabilities, expected, rtol=0, atol=1e-4)
        assert engine.ready().ready
        assert engine.snapshot().requests["classify", "ok"] == 16
        assert (engine.name, engine.backbone, engine.dtype) == ("tiny", backbone.config, "float32")
        with pytest.raises(UnknownTenant):
            engine.classify("nobody", TEXTS)
    engine.stop()


def test_a_start_that_fails_leaves_no_thread(config):
    engine = BlockingEngine(config(backbone=""))
    with pytest.raises(ConfigError):
        engine.start()
    assert not engine._thread.is_alive()
    engine.stop()


def test_it_has_every_method_of_the_engine():
    names = {name for name, _ in inspect.getmembers(Engine) if not name.startswith("_")}
    assert names <= {name for name, _ in inspect.getmembers(BlockingEngine)}
    assert BlockingEngine.classify.__doc__ == Engine.classify.__doc__
