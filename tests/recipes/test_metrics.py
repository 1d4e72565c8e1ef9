"""Metrics on cases counted by hand; the values of the longer ones are those of scikit-learn, seqeval and scipy."""

import pytest

from training.evaluate import accuracy, macro_f1, main_metric, pearson, span_f1, spans, spearman


def test_accuracy_and_macro_f1():
    gold, predicted = ["a", "a", "b", "b", "c", "a"], ["a", "b", "b", "b", "a", "a"]
    assert accuracy(predicted, gold) == pytest.approx(4 / 6)
    assert macro_f1(predicted, gold) == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    assert macro_f1(["d"], ["a"]) == 0.0  # a label that is only predicted counts too


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-x I-x O B-y", [(0, 2, "x"), (3, 4, "y")]),
        ("B-x B-x", [(0, 1, "x"), (1, 2, "x")]),
        ("I-x I-y I-y", [(0, 1, "x"), (1, 3, "y")]),
        ("O I-x B-x I-x", [(1, 2, "x"), (2, 4, "x")]),
        ("B-x I-y", [(0, 1, "x"), (1, 2, "y")]),
        ("B-creative-work I-creative-work", [(0, 2, "creative-work")]),
        ("", []),
    ],
)
def test_spans(tags, expected):
    assert spans(tags.split()) == expected


def test_span_f1_counts_exact_spans_only():
    gold = [["B-x", "I-x", "O"], ["B-y", "O"]]
    assert span_f1(gold, gold) == 1.0
    assert span_f1([["B-x", "O", "O"], ["B-y", "O"]], gold) == pytest.approx(0.5)
    assert span_f1([["O", "O", "O"], ["O", "O"]], gold) == 0.0
    assert span_f1([["O"]], [["O"]]) == 0.0


def test_correlations():
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert pearson([1, 2, 3], [3, 1, 2]) == pytest.approx(-0.5)
    assert pearson([1, 1], [1, 2]) == 0.0
    assert spearman([1, 5, 100], [0.1, 0.2, 0.3]) == pytest.approx(1)
    assert spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486832980505138)


def test_the_metric_that_picks():
    assert main_metric("classify", ("a",)) == "accuracy"
    assert main_metric("regression", ()) == "spearman"
    assert main_metric("token_classify", ("O", "B-x")) == "span_f1"
    assert main_metric("token_classify", ("NOUN", "VERB")) == "accuracy"
