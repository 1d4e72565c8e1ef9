"""The other ways to serve the same tenants, each at its best: what `multitenant` compares with.

Every system is a callable that turns the same requests into the same thing, mean-pooled L2-normalised embeddings
[N, H] float32 in the order of the requests; padding and unpadding are inside the timed call, tokenising is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workload import Requests

__all__ = ["BATCH_SIZES", "Bare", "BatchSplit", "PeftMixed", "PeftOneByOne", "System", "load_bare", "random_peft"]

System = Callable[[], Tensor]
BATCH_SIZES = (8, 16, 32, 64)  # sub-batches that a padded peer may use; the fastest is reported
RANK, ALPHA, TARGETS = 8, 16, ("query", "value")


class Bare:
    """The backbone alone, as everyone runs it: no tenant, so an upper bound for a peer that pads."""

    def __init__(self, model: Any, requests: Requests, batch_size: int) -> None:
        self.model, self.requests, self.batch_size = model, requests, batch_size
        self.batches = by_length(requests, range(len(requests)), batch_size)

    def __call__(self) -> Tensor:
        return run_padded(self.model, self.requests, self.batches)


class PeftMixed:
    """One PEFT model with every adapter; each row of a batch names its own (`adapter_names`)."""

    def __init__(self, model: Any, requests: Requests, batch_size: int) -> None:
        self.model, self.requests, self.batch_size = model, requests, batch_size
        self.batches = by_length(requests, range(len(requests)), batch_size)

    def __call__(self) -> Tensor:
        def names(batch: Sequence[int]) -> dict[str, list[str]]:
            return {"adapter_names": [adapter_name(self.requests.tenants[i]) for i in batch]}

        return run_padded(self.model, self.requests, self.batches, names)


class PeftOneByOne:
    """One PEFT model; the requests of one tenant after those of another (`set_adapter` in between)."""

    def __init__(self, model: Any, requests: Requests, batch_size: int) -> None:
        self.model, self.requests, self.batch_size = model, requests, batch_size
        tenants = sorted(set(requests.tenants))
        own = {t: [i for i, other in enumerate(requests.tenants) if other == t] for t in tenants}
        self.batches = [batch for t in tenants for batch in by_length(requests, own[t], batch_size)]

    def __call__(self) -> Tensor:
        def select(batch: Sequence[int]) -> dict[str, Any]:
            self.model.set_adapter(adapter_name(self.requests.tenants[batch[0]]))
            return {}

        return run_padded(self.model, self.requests, self.batches, select)


class BatchSplit:
    """The `adapters` library: one batch, its rows grouped by adapter (`BatchSplit`)."""

    def __init__(self, model: Any, requests: Requests, batch_size: int) -> None:
        self.model, self.requests, self.batch_size = model, requests, batch_size
        self.batches = [
            sorted(batch, key=requests.tenants.__getitem__)
            for batch in by_length(requests, range(len(requests)), batch_size)
        ]

    def __call__(self) -> Tensor:
        from adapters.composition import BatchSplit as Split

        def split(batch: Sequence[int]) -> dict[str, Any]:
            tenants = [self.requests.tenants[i] for i in batch]
            distinct = sorted(set(tenants))
            names = [adapter_name(t) for t in distinct]
            sizes = [tenants.count(t) for t in distinct]
            self.model.active_adapters = Split(*names, batch_sizes=sizes) if len(names) > 1 else names[0]
            return {}

        return run_padded(self.model, self.requests, self.batches, split)

    @staticmethod
    def model_of(folder: Path, peft_model: Any, num_tenants: int) -> Any:
        """The backbone with the LoRA modules of `peft_model`, as the `adapters` library holds them."""
        import adapters

        model = load_bare(folder, peft_model.dtype)
        adapters.init(model)
        config = adapters.LoRAConfig(r=RANK, alpha=ALPHA, attn_matrices=["q", "v"])
        for t in range(num_tenants):
            model.add_adapter(adapter_name(t), config=config)
        theirs = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in peft_model.named_parameters():
                if ".lora_" in name:
                    theirs[_adapters_name(name)].copy_(value)
        return model.eval()


def load_bare(folder: Path, dtype: torch.dtype) -> Any:
    """The backbone as `transformers` loads it, without a pooler."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=dtype, add_pooling_layer=False).eval()


def random_peft(folder: Path, num_tenants: int, dtype: torch.dtype, *, seed: int) -> Any:
    """A PEFT model with `num_tenants` random LoRA adapters, r 8 on query and value, strong enough to see."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="FEATURE_EXTRACTION", r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), lora_dropout=0.0
    )
    base = load_bare(folder, dtype)
    model = get_peft_model(base, config, adapter_name=adapter_name(0), autocast_adapter_dtype=False)
    for t in range(1, num_tenants):
        model.add_adapter(adapter_name(t), config, autocast_adapter_dtype=False)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_" in name:
                value.copy_(torch.randn(value.shape, generator=rng) * 0.05)
    return model.eval()


def adapter_name(tenant: int) -> str:
    return f"t{tenant}"


def by_length(requests: Requests, chosen: Iterable[int], batch_size: int) -> list[list[int]]:
    """Sub-batches of similar length, which is how padding is kept small."""
    order = sorted(chosen, key=lambda i: len(requests.token_ids[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@torch.inference_mode()
def run_padded(
    model: Any,
    requests: Requests,
    batches: Sequence[Sequence[int]],
    arguments: Callable[[Sequence[int]], dict[str, Any]] = lambda batch: {},
) -> Tensor:
    """Embeddings of all requests; `arguments` prepares the model for a sub-batch and gives what forward also takes."""
    answers: list[Tensor] = [torch.empty(0)] * len(requests)
    for batch in batches:
        ids, mask = pad([requests.token_ids[i] for i in batch])
        hidden = model(input_ids=ids, attention_mask=mask, **arguments(batch)).last_hidden_state.float()
        kept = torch.ones(ids.shape) if mask is None else mask.float()
        pooled = F.normalize((hidden * kept[:, :, None]).sum(1) / kept.sum(1, keepdim=True), dim=-1)
        for i, answer in zip(batch, pooled, strict=True):
            answers[i] = answer
    return torch.stack(answers)


def pad(token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """[B, longest] ids and their mask; no mask where nothing is padded, which is faster for `transformers`."""
    longest = max(map(len, token_ids))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in token_ids])
    if all(len(row) == longest for row in token_ids):
        return ids, None
    lengths = torch.tensor([len(row) for row in token_ids])
    return ids, (torch.arange(longest)[None, :] < lengths[:, None]).long()


def _adapters_name(name: str) -> str:
    """base_model.model.P.lora_A.t0.weight -> P.loras.t0.lora_A"""
    path, matrix, adapter, _ = name.removeprefix("base_model.model.").rsplit(".", 3)
    return f"{path}.loras.{adapter}.{matrix}"
