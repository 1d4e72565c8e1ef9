"""The experiment on a tiny backbone: every row is there, and the model itself answers as `transformers` does."""

from __future__ import annotations

import gzip
import json

import pytest

from benchmarks.experiments.fastptm_compress import main
from benchmarks.experiments_report import tables

TEXTS = {"money": ["transfer 20 euros", "my savings account"], "place": ["the nearest station", "a table for two"]}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data" / "words"
    folder.mkdir(parents=True)
    rows = [{"text": text, "label": label} for label, texts in TEXTS.items() for text in texts]
    for part in ("train", "dev", "test"):
        with gzip.open(folder / f"{part}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in 4 * rows)
    return folder.parent


@pytest.mark.slow
def test_every_tenant_is_told_next_to_the_whole_model(tiny, data, tmp_path, capsys):
    plot = tmp_path / "rank.svg"
    flags = ["--sets", "words", "--ranks", "2", "32", "--densities", "0.05", "--epochs", "1"]
    folders = ["--data", str(data), "--backbone", str(tiny["bert"].backbone.folder), "--models", str(tmp_path / "kept")]
    main([*folders, *flags, "--lora", "2", "--plot", str(plot), "--json"])
    result = json.loads(capsys.readouterr().out)
    of = {row["system"]: row for row in result["rows"]}
    assert list(of) == ["whole", "but tables", "rank 2", "rank 32", "density 5 %", "LoRA 2"]
    assert (of["whole"]["agreement"], of["whole"]["fits"]) == (1, 1)
    assert of["whole"]["logit_max"] < 1e-4
    assert of["rank 32"]["logit_max"] == pytest.approx(of["but tables"]["logit_max"], abs=1e-3)
    assert of["rank 2"]["bytes"] < of["rank 32"]["bytes"]
    assert of["rank 2"]["lost_part"] > of["rank 32"]["lost_part"]
    assert plot.stat().st_size

    def table(header, body):
        lines = [list(line) for line in body]
        assert {len(line) for line in lines} == {len(header)}
        return str(len(lines))

    render = tables(lambda name: [result], lambda row: "", table)["fastptm_compress"]
    assert render() == str(len(of))
