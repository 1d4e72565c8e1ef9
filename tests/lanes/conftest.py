"""A tiny backbone, some modules, and its word embeddings in a mapped file."""

from __future__ import annotations

import pytest

from tests.lanes.world import Modules, mapped
from tests.random_tenants import Factory
from tests.tiny import tiny_backbone
from vbert.formats.transformers_folder import read_backbone


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    return read_backbone(tiny_backbone("bert", tmp_path_factory.mktemp("backbone")))


@pytest.fixture(scope="session")
def modules(backbone, tmp_path_factory):
    return Modules(backbone, Factory(backbone, seed=3), tmp_path_factory.mktemp("modules"))


@pytest.fixture(scope="session")
def words(backbone, tmp_path_factory):
    return mapped(backbone, tmp_path_factory.mktemp("words") / "words.safetensors")
