"""What a trained tenant is worth: predictions over a data set, and the metrics of each task. Larger is better.

Tags are judged word by word: the tag of a word is that of its first token; a word that was cut off counts as "O".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from training.batches import Dataset
from training.data import Example
from training.model import PaddedBatch, TenantModel

__all__ = [
    "accuracy",
    "evaluate",
    "evaluate_with",
    "macro_f1",
    "main_metric",
    "pearson",
    "predict",
    "span_f1",
    "spans",
    "spearman",
]

_BATCH = 64


def main_metric(task: str, labels: Sequence[str]) -> str:
    """Name of the metric that picks the best epoch. BIO tags are judged by whole spans, other tags one by one."""
    if task == "token_classify":
        return "span_f1" if any(label.startswith("B-") for label in labels) else "accuracy"
    return "spearman" if task == "regression" else "accuracy"


def evaluate(model: TenantModel, data: Dataset, path: str = "plain") -> dict[str, float]:
    """All metrics of the model's task, by name. path: one of the model's."""
    return evaluate_with(model, data, model, path)


def evaluate_with(
    model: TenantModel, data: Dataset, forward: Callable[[PaddedBatch], Tensor], path: str
) -> dict[str, float]:
    """The same of what another forward gives for the batches of that path."""
    outputs, labels = predict(model, data, forward, path), model.head.labels
    if model.head.problem == "regression":
        numbers, gold = [float(output) for output in outputs], [float(example.target) for example in data.examples]
        return {"pearson": pearson(numbers, gold), "spearman": spearman(numbers, gold)}
    if model.head.kind == "token_classify":
        tags = [_word_tags(output, example, labels) for output, example in zip(outputs, data.examples, strict=True)]
        gold_tags = [_gold_tags(example) for example in data.examples]
        words, gold_words = list(chain(*tags)), list(chain(*gold_tags))
        return {"span_f1": span_f1(tags, gold_tags), "accuracy": accuracy(words, gold_words)}
    names = [labels[int(output.argmax())] for output in outputs]
    gold_names = [labels[int(example.target)] for example in data.examples]
    return {"accuracy": accuracy(names, gold_names), "macro_f1": macro_f1(names, gold_names)}


@torch.no_grad()
def predict(
    model: TenantModel, data: Dataset, forward: Callable[[PaddedBatch], Tensor] | None = None, path: str = "plain"
) -> list[Tensor]:
    """Head outputs of each example in order, on the host: [C], or [n, C] of a token head."""
    model.eval()
    forward = forward or model
    outputs: dict[int, Tensor] = {}
    for indices in data.by_length(_BATCH):
        for i, output in zip(indices, forward(data.batch(indices, model.device, path)[0]).cpu(), strict=True):
            outputs[i] = output[: data.lengths[i]] if model.head.kind == "token_classify" else output
    return [outputs[i] for i in range(len(data))]


def _word_tags(output: Tensor, example: Example, labels: Sequence[str]) -> list[str]:
    classes = output.argmax(-1).tolist()
    return [labels[classes[start]] if start >= 0 else "O" for start in example.word_starts]


def _gold_tags(example: Example) -> list[str]:
    assert isinstance(example.row.target, tuple)
    return list(example.row.target)


def accuracy(predicted: Sequence[str], gold: Sequence[str]) -> float:
    return sum(p == g for p, g in zip(predicted, gold, strict=True)) / len(gold)


def macro_f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
    """Mean F1 over the labels that occur in either."""
    right = Counter(g for p, g in zip(predicted, gold, strict=True) if p == g)
    given, wanted = Counter(predicted), Counter(gold)
    return sum(2 * right[label] / (given[label] + wanted[label]) for label in given | wanted) / len(given | wanted)


def span_f1(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> float:
    """Micro F1 of exact spans (same words, same type), as conlleval counts them; 0 where there are none at all."""
    found = [set(spans(tags)) for tags in predicted]
    wanted = [set(spans(tags)) for tags in gold]
    total = sum(map(len, found)) + sum(map(len, wanted))
    return 2 * sum(len(f & w) for f, w in zip(found, wanted, strict=True)) / total if total else 0.0


def spans(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first word, one past the last, type) of each span. BIO; an I- after another type, or after O, opens a span."""
    found: list[tuple[int, int, str]] = []
    begin, current = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        kind = "" if tag == "O" else tag.removeprefix("B-").removeprefix("I-")
        if current and (kind != current or tag.startswith("B-")):
            found.append((begin, i, current))
            current = ""
        if kind and not current:
            begin, current = i, kind
    return found


def pearson(predicted: Sequence[float], gold: Sequence[float]) -> float:
    """Correlation; 0 where either side is constant."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (predicted, gold))
    x, y = x - x.mean(), y - y.mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm else 0.0


def spearman(predicted: Sequence[float], gold: Sequence[float]) -> float:
    """Correlation of ranks, equal values sharing their mean rank."""
    return pearson(_ranks(predicted), _ranks(gold))


def _ranks(values: Sequence[float]) -> list[float]:
    counts = Counter(values)
    ends = dict(zip(sorted(counts), accumulate(counts[value] for value in sorted(counts)), strict=True))
    return [ends[value] - (counts[value] - 1) / 2 for value in values]
