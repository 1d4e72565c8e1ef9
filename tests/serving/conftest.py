"""A tiny real backbone, and engines on it."""

from __future__ import annotations

from contextlib import asynccontextmanager

import numpy as np
import pytest

from runtime import Engine, EngineConfig
from tests.ngram.test_local_layers import random_student
from tests.random_tenants import Factory
from tests.serving.skip_world import World
from tests.tiny import tiny_backbone
from training.export_skip import write_folder
from vbert.formats.transformers_folder import read_backbone


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    return read_backbone(tiny_backbone("bert", tmp_path_factory.mktemp("backbone")))


@pytest.fixture(scope="session")
def factory(backbone):
    return Factory(backbone, seed=7)


@pytest.fixture
def config(backbone, tmp_path):
    def config(**changes) -> EngineConfig:
        base = {"backbone": str(backbone.folder), "store": str(tmp_path / "store"), "name": "tiny"}
        return EngineConfig(**(base | {"dtype": "float32", "compute_threads": 1} | changes))

    return config


@pytest.fixture
def serving(config):
    """`async with serving(max_batch_tokens=64) as engine`."""

    @asynccontextmanager
    async def serving(*, policy=None, clock=None, **changes):
        async with Engine(config(**changes), policy=policy, clock=clock) as engine:
            yield engine

    return serving


# ---- skip backbones


@pytest.fixture(scope="module", params=[True, False], ids=["plain_way", "only_skips"])
def skipping(request, tmp_path_factory):
    """A skip backbone with a plain way, and one without."""
    folder = tmp_path_factory.mktemp("skipping")
    source = read_backbone(
        tiny_backbone("roberta", folder / "plain", num_layers=3, positions=130)
    )  # its padding id is 1
    write_folder(folder / "skip", random_student(source), source, plain_way=request.param, name="tiny-skip")
    return read_backbone(folder / "skip")


@pytest.fixture(autouse=True)
def same_places(monkeypatch):
    """N-grams that share a place in the cache are learnt later, and which ones do would differ from run to run."""
    monkeypatch.setattr("vbert.ngram.cache._new_salt", lambda: np.uint64(1 << 63))


@pytest.fixture
def world(skipping, tmp_path):
    return World(skipping, tmp_path)


@pytest.fixture
def on_skip(world, serving):
    def on_skip(**changes):
        return serving(**({"backbone": str(world.backbone.folder)} | changes))

    return on_skip
