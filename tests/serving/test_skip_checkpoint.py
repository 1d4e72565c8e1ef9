"""The paths of a skip backbone whose upper layers are a real checkpoint's, its local layers random.

The checkpoint is the folder that VBERT_MODEL names, else e5-12l under shared/models, whose padding id is 1.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.ngram.test_local_layers import random_student
from tests.serving.helpers import add
from training.export_skip import write_folder
from vbert.formats.transformers_folder import read_backbone
from vbert.ngram.index import shortened

TEXTS = ["play the new album", "what is my balance", "a very long review of a film that nobody liked", "hi"]
CLOSE = {"rtol": 0, "atol": 1e-3}  # rows of tables are float16


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    named = Path(os.environ.get("VBERT_MODEL", "shared/models/e5-12l"))
    if not (named / "config.json").is_file():
        pytest.skip(f"{named} is not here; VBERT_MODEL may name the folder of a checkpoint")
    source, folder = read_backbone(named), tmp_path_factory.mktemp("skipping")
    write_folder(folder, random_student(source), source, plain_way=True, name="real-skip")
    return read_backbone(folder)


async def test_each_path_gives_its_own_answer(world, on_skip):
    module = world.tenant(0)
    single = shortened(world.keys(TEXTS[2:]), 1)  # of some texts there are only the centres
    table = world.table(np.concatenate([world.keys(TEXTS[:2]), single]))
    async with on_skip(ngrams=(table,), max_backoff=1.0, sequence_store_bytes=2**24) as engine:
        await add(engine, "t", module)
        for path in ("plain", "exact", "compute"):
            answer = await engine.classify("t", TEXTS, path=path)
            for text, got in zip(TEXTS, answer.probabilities, strict=True):
                wanted = world.expected(module, text, "exact" if path == "compute" else path)
                np.testing.assert_allclose(got, wanted, **CLOSE)
        assert (await engine.classify("t", TEXTS, path="plain")).paths == ("stored",) * len(TEXTS)
        backed_off = await engine.classify("t", TEXTS, path="backoff")
        assert backed_off.paths == ("backoff",) * len(TEXTS)
        for text, got in zip(TEXTS[:2], backed_off.probabilities, strict=False):
            np.testing.assert_allclose(got, world.expected(module, text, "exact"), **CLOSE)
        assert engine.snapshot().ngrams["unigrams"] > 0
