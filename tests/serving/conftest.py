"""A tiny real backbone, and engines on it."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

from runtime import Engine, EngineConfig
from tests.random_tenants import Factory
from tests.tiny import tiny_backbone
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
