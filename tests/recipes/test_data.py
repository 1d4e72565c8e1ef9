"""Files in: every bad row is one line that names file and line; every kind of row comes out as it should."""

import gzip
import re

import pytest

from tests.recipes.conftest import write_rows
from training.data import IGNORED, label_names, read_rows, tokenise
from vbert.errors import BadRequest
from vbert.formats.transformers_folder import read_backbone
from vbert.tokenizer import Tokenizer

GOOD = b'{"text": "a cat", "label": "pet"}\n'
BAD = [
    ("classify", GOOD + b'{"text": "a dog"', "line 2 is not JSON"),
    ("classify", GOOD + b"\n\n[1, 2]\n", "line 4 is a list"),
    ("classify", GOOD + b'{"text": "caf\xe9", "label": "x"}', "line 2 is not UTF-8"),
    ("classify", b"[" * 100_000, "line 1 is not JSON"),
    ("classify", b'{"text": "", "label": "x"}', "line 1: 'text' is ''"),
    ("classify", b'{"text": 5, "label": "x"}', "line 1: 'text' is 5"),
    ("classify", b'{"label": "x"}', "line 1: 'text' is missing"),
    ("classify", b'{"text": "a", "text_b": null, "label": "x"}', "line 1: 'text_b' is missing"),
    ("classify", b'{"text": "a", "label": ["x"]}', "line 1: 'label' is ['x']"),
    ("classify", b'{"text": "a", "label": 0.5}', "line 1: 'label' is 0.5"),
    ("classify", b'{"text": "a", "label": true}', "line 1: 'label' is True"),
    ("regression", b'{"text": "a", "label": "x"}', "line 1: 'label' is 'x'"),
    ("regression", b'{"text": "a", "label": NaN}', "line 1: 'label' is nan"),
    ("token_classify", b'{"tokens": ["a", "b"], "tags": ["O"]}', "line 1 has 2 tokens and 1 tags"),
    ("token_classify", b'{"tokens": "a b", "tags": ["O", "O"]}', "line 1: 'tokens' is 'a b'"),
    ("token_classify", b'{"tokens": [], "tags": []}', "line 1: 'tokens' is []"),
    ("classify", b"\n \n", "has no rows"),
]


@pytest.mark.parametrize(("task", "content", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, task, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadRequest, match=re.escape(f"{path} {message}")) as caught:
        read_rows(path, task)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_file_that_is_not_there_or_cut_off_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    with pytest.raises(BadRequest, match=r"rows.jsonl.gz does not exist"):
        read_rows(path, "classify")
    for content in (gzip.compress(GOOD * 50)[:-9], GOOD, b"\x1f\x8b\x08" + bytes(30)):
        path.write_bytes(content)
        with pytest.raises(BadRequest, match=r"rows.jsonl.gz cannot be read"):
            read_rows(path, "classify")


def test_rows_of_every_task(tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl.gz",
        [
            {"text": "a cat", "label": 1, "tokens_seen": 7},
            {"text": "a", "text_b": "b", "label": "no"},
            {"tokens": ["play", "it"], "label": "PlayMusic", "tags": ["O", "O"]},
        ],
    )
    assert [(row.input, row.target) for row in read_rows(path, "classify")] == [
        ("a cat", "1"),
        (("a", "b"), "no"),
        ("play it", "PlayMusic"),
    ]
    path = write_rows(tmp_path / "numbers.jsonl", [{"text": "a", "label": 3}])
    assert [row.target for row in read_rows(path, "regression")] == [3.0]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert read_rows(tmp_path / "marked.jsonl", "classify")[0].target == "pet"


def test_tags_lie_on_the_first_token_of_a_word_and_a_word_that_was_cut_has_none(tmp_path, backbone_folder):
    words, tags = ["savings", "zzq", "account"], ["O", "I-x", "B-x"]
    rows = read_rows(write_rows(tmp_path / "t.jsonl", [{"tokens": words, "tags": tags}]), "token_classify")
    labels = label_names(rows)
    assert labels == ("O", "B-x", "I-x")
    backbone = read_backbone(backbone_folder)
    tokenizer = Tokenizer.load(backbone_folder, backbone.config)
    (example,) = tokenise(rows, tokenizer, labels, 20)  # [CLS] savings z ##z ##q account [SEP]
    assert example.target.tolist() == [IGNORED, 0, 2, IGNORED, IGNORED, 1, IGNORED]
    assert example.word_starts == (1, 2, 5)
    (example,) = tokenise(rows, tokenizer, labels, 6)
    assert example.word_starts == (1, 2, -1)


def test_a_label_that_training_never_saw_is_named(tmp_path, backbone_folder):
    rows = read_rows(write_rows(tmp_path / "dev.jsonl", [{"text": "a", "label": "dog"}]), "classify")
    tokenizer = Tokenizer.load(backbone_folder, read_backbone(backbone_folder).config)
    with pytest.raises(BadRequest, match=r"dev.jsonl line 1: label 'dog' is not in the training file"):
        tokenise(rows, tokenizer, ("pet",), 20)
