"""What a student is trained on: to be like the teacher, or to guess hidden tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.distill_config import DistillConfig
from training.skip_layers import FullLayer
from training.skip_student import Batch, SkipStudent, Teacher
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import Backbone
from vbert.tokenizer import Tokenizer

__all__ = ["DistilLoss", "MaskedLoss", "relative_error", "score_error"]


class DistilLoss(nn.Module):
    """The parts of the loss by name, to be added up: mean squared distance of states, in units of the teacher's
    variance, averaged over the states; of the mean state of a text; if wanted, of attention scores before the softmax.
    """

    def __init__(
        self, config: DistillConfig, teacher: Teacher, states: tuple[int, ...], attentions: tuple[int, ...]
    ) -> None:
        """states, attentions: of the teacher, see DistillConfig."""
        super().__init__()
        self._teacher = [teacher]  # a list: no part of the state dict
        self._attentions = attentions
        self._states, self._pooled, self._attention = states, config.pooled_loss, config.attention_loss

    def forward(self, student: SkipStudent, batch: Batch, kept: Tensor | None) -> dict[str, Tensor]:
        (teacher,) = self._teacher
        with torch.no_grad():
            taught = teacher(batch)
        learnt, mask, count = student(batch, kept), batch.mask, len(self._states)
        parts = {
            f"state {i}": relative_error(own[mask], taught[i][mask]) / count
            for own, i in zip(learnt, self._states, strict=True)
        }
        if self._pooled:
            last = self._states[-1]
            parts["pooled"] = self._pooled * relative_error(_mean(learnt[-1], mask), _mean(taught[last], mask)) / count
        if self._attention:
            scores = []
            for layer, own, i in zip(student.upper, learnt, self._attentions, strict=False):
                above = teacher.layers[i]
                assert isinstance(layer, FullLayer)
                assert isinstance(above, FullLayer)
                with torch.no_grad():
                    wanted = above.scores(taught[i]).float()
                scores.append(score_error(layer.scores(own), wanted, mask))
            parts["attention"] = self._attention * torch.stack(scores).mean()
        return parts


class MaskedLoss(nn.Module):
    """Guess hidden tokens from the last states (BERT's masked language model), by a head that is trained as well and
    then thrown away. Eight of ten hidden tokens become [MASK], one a random token, one stays. Source: Devlin et al.
    2019, arXiv:1810.04805."""

    def __init__(self, config: DistillConfig, backbone: Backbone, tokenizer: Tokenizer) -> None:
        super().__init__()
        mask_id = next((i for name in ("[MASK]", "<mask>") if (i := tokenizer.id_of(name)) is not None), None)
        if mask_id is None:
            raise ConfigError("the tokenizer has no mask token, and objective mlm needs one", param="objective")
        self._share, self._mask_id = config.mask_share, mask_id
        self._special = torch.tensor(sorted(tokenizer.special_ids))
        width = backbone.config.hidden_size
        self.inner, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(backbone.config.vocab_size))
        nn.init.eye_(self.inner.weight)
        nn.init.zeros_(self.inner.bias)

    def forward(self, student: SkipStudent, batch: Batch, kept: Tensor | None) -> dict[str, Tensor]:
        ids, device = batch.token_ids, batch.token_ids.device
        may = batch.mask & ~torch.isin(ids, self._special.to(device))
        hidden = may & (torch.rand(ids.shape, device=device) < self._share)
        draw = torch.rand(ids.shape, device=device)
        random = torch.randint(len(self.bias), ids.shape, device=device)
        shown = torch.where(hidden & (draw < 0.8), self._mask_id, ids)
        shown = torch.where(hidden & (draw >= 0.9), random, shown)
        states = student(Batch(shown, batch.type_ids, batch.mask), kept)[-1][hidden]
        words = student.words
        logits = F.linear(self.norm(F.gelu(self.inner(states))), words.to(states.dtype)).float() + self.bias
        loss = F.cross_entropy(logits, ids[hidden], reduction="sum") / max(1, len(states))
        return {"masked tokens": loss}


def relative_error(own: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared distance of rows [m, H], in units of the variance of those wanted."""
    wanted = wanted.float()
    return (own.float() - wanted).pow(2).mean() / wanted.var(0, correction=0).mean().clamp_min(1e-12)


def score_error(own: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """Mean squared distance of attention scores [B, A, n, n] between tokens of a text, in units of the variance of
    those wanted. mask: [B, n]."""
    pairs, wanted = mask[:, None, :, None] & mask[:, None, None, :], wanted.float()
    far = (own.float() - wanted).pow(2) * pairs
    return far.sum() / (pairs.sum() * wanted.shape[1]) / wanted[pairs.expand_as(wanted)].var().clamp_min(1e-12)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].float()
    return (states.float() * weights).sum(1) / weights.sum(1)
