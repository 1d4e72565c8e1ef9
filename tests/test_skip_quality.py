"""`vbert bench skip_quality`, on small backbones and made-up sets: every student by every path, and no set twice."""

import gzip
import itertools
import json

import pytest

import training.distill_lower_layers as distill
from benchmarks import report, skip_quality
from benchmarks.report import results
from tests.tiny import TEXTS, tiny_backbone
from training.distill_config import DistillConfig
from vbert.errors import ConfigError

KINDS = {"3+1": {"lower": 1}, "window": {"lower": 1, "kind": "window"}, "full": {"lower": 1, "kind": "full"}}


@pytest.fixture
def data(tmp_path):
    rows = {
        "long": [{"text": text, "label": str(len(text) > 24)} for text in TEXTS * 4],
        "stsb": [{"text": text, "text_b": TEXTS[0], "label": len(text)} for text in TEXTS * 4],
    }
    for name, part in itertools.product(rows, ("train", "dev", "test")):
        (tmp_path / name).mkdir(exist_ok=True)
        with gzip.open(tmp_path / name / f"{part}.jsonl.gz", "wt") as file:
            file.write("\n".join(map(json.dumps, rows[name])))
    return tmp_path


@pytest.mark.slow
def test_every_student_is_measured_by_every_path_and_no_set_twice(data, monkeypatch, capsys, tmp_path):
    teacher = tiny_backbone("bert", tmp_path / "teacher", num_layers=4)
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
    students = []
    for name, settings in KINDS.items():
        common = {"backbone": str(teacher), "texts": (str(tmp_path / "corpus.txt"),), "tokens": 500, "skipped": 2}
        distill.run(DistillConfig(out=str(tmp_path / name), **common, **settings))
        students.append(f"{name}={tmp_path / name}")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    common = ["--data", str(data), "--teacher", str(teacher), "--texts", str(tmp_path / "corpus.txt"), "--append"]
    argv = [*common, "--sets", "long", "--entries", "20", "--epochs", "1", "--top-layers", "2", "--skip", *students]
    skip_quality.main(argv)
    found = [row for result in results("skip_quality") for row in result["rows"]]
    paths = {"teacher": ["plain"], "3+1": ["plain", "exact", "backoff 20 1"], "window": ["exact"], "full": ["plain"]}
    for name, wanted in paths.items():
        for each in ("stsb", "long"):
            assert [row["path"] for row in found if (row["system"], row["set"]) == (name, each)] == wanted
    with pytest.raises(ConfigError, match=r"backoff needs --texts"):
        skip_quality.main(["--data", str(data), "--teacher", str(teacher), "--paths", "backoff", "--skip", students[0]])
    capsys.readouterr()
    skip_quality.main(argv)
    assert len([row for result in results("skip_quality") for row in result["rows"]]) == len(found)
