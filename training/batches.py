"""`Dataset`: tokenised examples as padded batches of similar lengths, and the frozen rows computed once for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from training.data import IGNORED, Example
from training.model import PaddedBatch, TenantModel
from training.progress import Progress, silent

__all__ = ["Dataset"]

_POOL_BATCHES = 32  # batches that are shuffled together and then cut by length: little padding, still random
_FROZEN_BATCH = 64


class Dataset:
    """Examples in the order given. `rows`: by path, what the frozen layers make of each, [n, H]; empty: not kept."""

    def __init__(self, examples: Sequence[Example], rows: Mapping[str, Sequence[Tensor]] | None = None) -> None:
        self.examples, self.rows = examples, rows or {}
        self.lengths = [len(example.token_ids) for example in examples]

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int], device: torch.device, path: str = "plain") -> tuple[PaddedBatch, Tensor]:
        """Inputs and targets, padded: targets are [B], or [B, n] with IGNORED at padding."""
        examples = [self.examples[i] for i in indices]
        target = _padded([example.target for example in examples], device, IGNORED)
        if path in self.rows:
            rows = [self.rows[path][i] for i in indices]
            return PaddedBatch(mask=_mask(rows, device), rows=_padded(rows, device)), target
        ids, types = [example.token_ids for example in examples], [example.type_ids for example in examples]
        padded = {"token_ids": _padded(ids, device), "type_ids": _padded(types, device)}
        return PaddedBatch(mask=_mask(ids, device), path=path, **padded), target

    def by_length(self, batch_size: int) -> list[list[int]]:
        """All examples once, shortest first."""
        order = sorted(range(len(self)), key=self.lengths.__getitem__)
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def shuffled(self, batch_size: int, generator: torch.Generator) -> list[list[int]]:
        """All examples once in random batches of similar lengths, in random order."""
        order = torch.randperm(len(self), generator=generator).tolist()
        size = batch_size * _POOL_BATCHES
        pools = [sorted(order[i : i + size], key=self.lengths.__getitem__) for i in range(0, len(order), size)]
        batches = [pool[i : i + batch_size] for pool in pools for i in range(0, len(pool), batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def frozen(self, model: TenantModel, max_bytes: int, progress: Progress = silent) -> Dataset:
        """With the rows below the lowest delta computed once; the same data set where they would exceed `max_bytes`."""
        num_rows = (len(self) if model.pools_first else sum(self.lengths)) * len(model.paths)
        lowest = 0 if model.paths != ("plain",) else 1  # looking n-grams up is work, embedding words is none
        if model.lowest_layer < lowest or num_rows * model.config.hidden_size * 4 > max_bytes:
            return self
        kept: dict[str, list[Tensor]] = {}
        for path in model.paths:
            rows: dict[int, Tensor] = {}
            for indices in self.by_length(_FROZEN_BATCH):
                batch = model.frozen_rows(self.batch(indices, model.device, path)[0])
                assert batch.rows is not None
                rows |= {i: states[mask].cpu() for i, states, mask in zip(indices, batch.rows, batch.mask, strict=True)}
                progress("layers below", len(kept) * len(self) + len(rows), len(model.paths) * len(self))
            kept[path] = [rows[i] for i in range(len(self))]
        return Dataset(self.examples, kept)


def _padded(tensors: Sequence[Tensor], device: torch.device, padding: int = 0) -> Tensor:
    if not tensors[0].ndim:
        return torch.stack(list(tensors)).to(device)
    return pad_sequence(list(tensors), batch_first=True, padding_value=padding).to(device)


def _mask(sequences: Sequence[Tensor], device: torch.device) -> Tensor:
    """[B, n] bool, True where a sequence has a row."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
