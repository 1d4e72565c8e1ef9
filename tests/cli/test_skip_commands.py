"""From a plain folder to tenants that skip: `vbert distill`, `ngrams`, `train`, as a user goes through them."""

import argparse
import asyncio
import contextlib
import io
import json

import pytest

from runtime import Engine, EngineConfig
from runtime.flags import add_flags, given
from tests.tiny import TEXTS
from training.distill_config import DistillConfig


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(TEXTS * 30))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    lines = [{"text": text, "label": "long" if len(text) > 24 else "short"} for text in TEXTS * 6]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("words", [["a.txt,b.txt"], ["a.txt", "b.txt"]], ids=["commas", "words"])
@pytest.mark.parametrize("from_variable", [False, True])
def test_files_are_words_or_parted_by_commas(words, from_variable, monkeypatch):
    if from_variable:
        monkeypatch.setenv("VBERT_OWN_TEXTS", "c.txt,d.txt")
    parser = argparse.ArgumentParser()
    add_flags(parser, DistillConfig)
    assert "write them as 3,4" in _complaint(parser, "--upper", "a")
    settings = given(parser.parse_args(["--texts", *words, "--upper", "9,11"]), DistillConfig)
    own = {"own_texts": ("c.txt", "d.txt")} if from_variable else {}
    assert settings == {"texts": ("a.txt", "b.txt"), "upper": (9, 11)} | own


def _complaint(parser, *args):
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as said:
        parser.parse_args(args)
    return said.getvalue()


@pytest.mark.slow
def test_from_a_plain_backbone_to_a_tenant_that_skips(ok, refused, backbone, corpus, rows, tmp_path):
    skip, table, store = tmp_path / "skip", tmp_path / "corpus.ngrams", tmp_path / "store"
    distil = ("distill", "--backbone", backbone.folder, "--texts", corpus, corpus, "--skipped", 1, "--lower", 1)
    report = ok(*distil, "--tokens", 3000, "--batch-size", 16, "--out", skip, "--json")
    assert sum(report["after"].values()) < sum(report["before"].values())
    assert "skip backbone already" in refused(
        "distill", "--backbone", skip, "--texts", corpus, "--skipped", 1, "--out", tmp_path / "again"
    )

    built = ok("ngrams", "build", table, "--backbone", skip, "--texts", corpus, "--json")
    assert built["texts"] == len(TEXTS) * 30
    told = ok("ngrams", "stats", table, "--texts", corpus, "--backbone", skip, "--json")
    assert (told["entries"], told["covered_by_trigrams"]) == (built["entries"], 1.0)
    assert told["entries"] == told["trigrams"] + told["bigrams"] + told["tokens"]
    assert ok("ngrams", "check", table, "--json")["entries"] == built["entries"]
    wrong = refused("ngrams", "stats", table, "--texts", corpus, "--backbone", backbone.folder)
    assert "has no local layers" in wrong
    small = ok("ngrams", "prune", tmp_path / "small.ngrams", table, "--max-bytes", 20_000, "--dtype", "int8", "--json")
    assert small["entries"] < small["of"] == built["entries"]
    assert small["bytes"] < 25_000
    merged = ok("ngrams", "merge", tmp_path / "m.ngrams", tmp_path / "small.ngrams", table, "--json")
    assert merged["entries"] == built["entries"]

    train = ("train", "t", "--backbone", skip, "--train", rows, "--store", store, "--epochs", 2, "--json")
    report = ok(*train, "--paths", "plain,exact,backoff", "--top-layers", 1, "--exits", 1)
    assert set(report["by_path"]) == {"plain", "exact", "backoff"}
    assert (report["tenant"], set(report["exits"])) == ("t", {"threshold", "plain", "exact", "backoff"})
    assert "deltas above them only" in refused(*train, "--paths", "exact", "--top-layers", 2)
    assert "the backbone has no path exact" in refused(*train, "--paths", "exact", "--backbone", backbone.folder)

    async def ask():
        config = EngineConfig(backbone=str(skip), store=str(store), ngrams=(str(table),), dtype="float32")
        async with Engine(config) as engine:
            return [(await engine.classify("t", [TEXTS[1]], path=path)).paths[0] for path in (None, "plain", "backoff")]

    assert asyncio.run(ask()) == ["exact", "plain", "backoff"]


def test_what_is_no_skip_backbone_is_refused(refused, backbone, corpus, tmp_path):
    build = ("ngrams", "build", tmp_path / "t", "--texts", corpus, "--backbone")
    assert "has no local layers" in refused(*build, backbone.folder)
    (tmp_path / "bad.ngrams").write_bytes(b"nothing")
    assert "is no n-gram table, or damaged" in refused("ngrams", "stats", tmp_path / "bad.ngrams")
    assert "is a folder" in refused("ngrams", "stats", tmp_path)
    assert "there is no folder" in refused(
        "ngrams", "build", tmp_path / "none" / "t", "--texts", corpus, "--backbone", backbone.folder
    )
    distil = ("distill", "--backbone", backbone.folder, "--skipped", 1, "--lower", 1, "--out", tmp_path / "x")
    assert "does not exist" in refused(*distil, "--texts", "none.txt")
