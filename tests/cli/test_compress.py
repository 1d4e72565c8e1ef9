"""`vbert tenants compress` on a model that `transformers` saved, and the tenant that comes of it, served."""

from __future__ import annotations

import pytest

from runtime import BlockingEngine, EngineConfig
from tests.formats.test_compressed import fine_tuned, low_rank


@pytest.fixture(scope="module")
def folder(backbone, tmp_path_factory):
    return fine_tuned(backbone, tmp_path_factory.mktemp("whole"), low_rank)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_model_becomes_a_small_tenant_that_is_served(vbert, backbone, folder, tmp_path, dtype):
    out, store, texts = tmp_path / "small.safetensors", tmp_path / "store", tmp_path / "texts.txt"
    texts.write_text("one text\nanother text\n" * 5)
    flags = ["--backbone", backbone.folder, "--texts", texts, "--max-texts", 6, "--store-dtype", dtype, "--json"]
    code, told, _ = vbert("tenants", "compress", folder, out, *flags)
    assert code == 0
    assert (told["texts"], told["same_label"], told["dropped"]) == (6, 1, [])
    assert (told["mean_rank"], told["weights_sparse"]) == (3, 0)
    assert told["num_bytes"] == out.stat().st_size
    code, added, _ = vbert("tenants", "add", "small", out, "--backbone", backbone.folder, "--store", store, "--json")
    assert (code, added["task"]) == (0, "classify")
    with BlockingEngine(EngineConfig(backbone=str(backbone.folder), store=str(store), name="tiny")) as engine:
        assert engine.classify("small", ["one text"]).probabilities.shape == (1, 3)


def test_what_is_wrong_is_one_line(vbert, backbone, folder, tmp_path):
    where = ["--backbone", backbone.folder]
    for arguments, message in (
        ([folder, tmp_path / "out", *where, "--rank", -1], "give a rank of at least 0"),
        ([tmp_path / "nothing", tmp_path / "out", *where], "config.json"),
        ([folder, tmp_path / "no" / "out", *where], "check the path"),
        ([folder, tmp_path / "out", *where, "--texts", "nowhere.txt"], "nowhere.txt does not exist"),
    ):
        code, _, err = vbert("tenants", "compress", *arguments)
        assert (code, message in err) == (2, True), err
