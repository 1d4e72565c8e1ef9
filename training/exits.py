"""The confidence above which answers leave early: the lowest that costs no more accuracy on dev than is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from training.batches import Dataset
from training.evaluate import predict
from training.model import TenantModel
from vbert.exits import confidences

__all__ = ["Judged", "lowest_threshold"]

# Fine where it matters: a trained classifier is often nearly sure.
_THRESHOLDS = (*(i / 100 for i in range(20, 99)), 0.985, 0.99, 0.993, 0.995, 0.997, 0.998, 0.999, 0.9995, 0.9999, 1.0)


@dataclass(frozen=True, slots=True)
class Judged:
    """What the E exits of a classifier, and then its head, say of N examples. sure: [N, E], how confident exits are.
    right: [N, E + 1]. ends: how many layers are computed for an answer of each, [E + 1]."""

    sure: Tensor
    right: Tensor
    ends: Tensor

    @classmethod
    def of(cls, model: TenantModel, data: Dataset, path: str) -> Judged:
        outputs = torch.stack(predict(model, data, lambda batch: torch.stack(model.outputs(batch), 1), path))
        head, gold = model.head.export(), torch.tensor([int(example.target) for example in data.examples])
        sure = [confidences(list(outputs[:, i]), [head] * len(gold)) for i in range(len(model.exit_layers))]
        return cls(
            sure=torch.tensor(sure).T,
            right=outputs.argmax(2) == gold[:, None],
            ends=torch.tensor([*model.exit_layers, model.config.num_layers]),
        )

    def taken(self, threshold: float) -> Tensor:
        """[N]: which answer is given, E for that of the head."""
        leaves = torch.cat([self.sure > threshold, torch.ones(len(self.sure), 1, dtype=torch.bool)], 1)
        return leaves.int().argmax(1)  # the first of equals

    def accuracy(self, threshold: float) -> float:
        return float(self.right.gather(1, self.taken(threshold)[:, None]).float().mean())

    def report(self, threshold: float) -> dict[str, object]:
        """accuracy: of the answers that are given. left: share of the texts that leave before each layer. layers: that
        are computed for a text, as a share of all."""
        taken = self.taken(threshold)
        shares = torch.bincount(taken, minlength=len(self.ends)) / len(taken)
        return {
            "accuracy": self.accuracy(threshold),
            "left": {str(int(layer)): float(share) for layer, share in zip(self.ends[:-1], shares[:-1], strict=True)},
            "layers": float(self.ends[taken].float().mean() / self.ends[-1]),
        }


def lowest_threshold(judged: list[Judged], allowed: float) -> float:
    """For all paths of a tenant together. allowed: loss of accuracy. No higher threshold costs more either."""

    def mean(threshold: float) -> float:
        return fmean(each.accuracy(threshold) for each in judged)

    least, found = mean(1.0) - allowed, 1.0
    for threshold in reversed(_THRESHOLDS):
        if mean(threshold) < least - 1e-9:
            break
        found = threshold
    return found
