"""Token labels to spans."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from runtime.entities import find_entities
from vbert.tokenizer import Encoded, Tokenizer


def spans(labels, item="aa bb cc dd", words=None, offsets=None):
    """Entities when token i has labels[i]; one token a word unless `words` says which word it is of."""
    names = sorted({*labels, "O"})
    words = list(range(len(labels))) if words is None else words
    offsets = [(3 * w, 3 * w + 2) for w in words] if offsets is None else offsets
    n = len(labels) + 2
    encoded = Encoded(
        token_ids=[0] * n,
        type_ids=[0] * n,
        full_length=n,
        offsets=[(0, 0), *offsets, (0, 0)],
        word_ids=[None, *words, None],
    )
    probabilities = np.full((n, len(names)), 0.01, np.float32)
    probabilities[0, 0] = probabilities[-1, 0] = 1.0  # what special tokens say is never looked at
    for i, label in enumerate(labels):
        probabilities[i + 1, names.index(label)] = 0.9
    found = find_entities(item, encoded, probabilities, names)
    assert all(entity.score == pytest.approx(0.9) for entity in found)
    return [(entity.label, entity.text) for entity in found]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["O", "O", "O", "O"], []),
        (["B-X", "I-X", "O", "B-X"], [("X", "aa bb"), ("X", "dd")]),
        (["B-X", "B-X", "I-X", "I-Y"], [("X", "aa"), ("X", "bb cc"), ("Y", "dd")]),
        (["I-X", "I-X", "O", "I-X"], [("X", "aa bb"), ("X", "dd")]),
        (["B-X", "E-X", "S-X", "S-X"], [("X", "aa bb"), ("X", "cc"), ("X", "dd")]),
        (["B-X", "L-X", "U-X", "O"], [("X", "aa bb"), ("X", "cc")]),
        (["X", "X", "Y", "O"], [("X", "aa bb"), ("Y", "cc")]),
        (["B-a-b", "I-a-b", "O", "O"], [("a-b", "aa bb")]),
    ],
)
def test_schemes(labels, expected):
    assert spans(labels) == expected


def test_a_word_has_the_label_of_its_first_token_and_all_its_characters():
    found = spans(
        ["B-X", "O", "I-X", "O"], item="aabb cc dd", words=[0, 0, 1, 2], offsets=[(0, 2), (2, 4), (5, 7), (8, 10)]
    )
    assert found == [("X", "aabb cc")]


def test_code_points_not_bytes():
    assert spans(["B-X", "O"], item="Zürich 🚂", words=[0, 1], offsets=[(0, 6), (7, 8)]) == [("X", "Zürich")]


def test_a_space_before_a_word_is_not_part_of_it():
    assert spans(["B-X", "I-X"], item="a  b", words=[0, 1], offsets=[(0, 1), (1, 4)]) == [("X", "a  b")]
    assert spans(["O", "I-X"], item="a  b", words=[0, 1], offsets=[(0, 1), (1, 4)]) == [("X", "b")]


def test_lists_of_words_give_word_positions():
    found = spans(["B-X", "O", "I-X", "O"], item=["New", "York", "is"], words=[0, 0, 1, 2])
    assert found == [("X", "New York")]


@pytest.fixture(scope="module")
def metaspace():
    """As XLM-R and multilingual E5 have it: the space before a word belongs to its first piece, untrimmed."""
    pieces = ["<s>", "</s>", "<unk>", "▁", "▁Alice", "▁met", "Z", "ürich", "北京", "市", "🚂", *"abcdefgé"]
    backend = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return Tokenizer(backend, vocab_size=len(pieces), has_types=False)


def every_word(tokenizer, item):
    """The entities of an input where each word begins one."""
    (encoded,) = tokenizer.encode([item])
    probabilities = np.tile(np.array([[0.1, 0.9]], np.float32), (len(encoded.token_ids), 1))
    return find_entities(item, encoded, probabilities, ["O", "B-X"])


@pytest.mark.parametrize(
    "text",
    [
        "Alice met Zürich.",
        "Alice met \n",
        " ",
        "caf\u00e9 cafe\u0301 a\u0308b\u0308 met",
        "  Alice   met\u3000Zürich",
        "🚂🚂 met 👍🏽 Zürich",
        "北京市 Zürich 我住在北京市",
        "ﬁne ½ Ⅷ met",
    ],
)
def test_metaspace_words_are_code_points_without_white_space(metaspace, text):
    found = every_word(metaspace, text)
    assert [entity.text for entity in found] == text.split()
    assert all(text[entity.start : entity.end] == entity.text for entity in found)


def test_metaspace_lists_of_words_count_words(metaspace):
    words = ["Alice", "北京市", "e\u0301", "🚂🚂", "New Zürich"]
    found = every_word(metaspace, words)
    assert [(entity.start, entity.end, entity.text) for entity in found] == [(i, i + 1, w) for i, w in enumerate(words)]


def test_white_space_between_two_words_does_not_part_them(metaspace):
    (encoded,) = metaspace.encode(["Alice\n \nmet"])
    probabilities = np.tile(np.array([[0.1, 0.9]], np.float32), (len(encoded.token_ids), 1))
    assert [entity.text for entity in find_entities("Alice\n \nmet", encoded, probabilities, ["O", "I-X"])] == [
        "Alice\n \nmet"
    ]
