"""What others hold: PEFT and `adapters` with as many LoRA tenants as fit the time given to add them.

Each in a process of its own, asked by Zipf's law as vbert is, 64 requests at a time in its best batches.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.density_cells import Cell, asked_for, memory_mib, milliseconds
from benchmarks.peers import BatchSplit, PeftMixed, System, adapter_name, load_bare
from benchmarks.serving import texts
from benchmarks.workload import Requests
from vbert.formats.transformers_folder import read_backbone
from vbert.tokenizer import Tokenizer

__all__ = ["PEERS", "peer"]

_ADD_LIMIT_S = 60.0  # seconds for adding tenants; who needs longer holds fewer
_BATCH = 64
_SUB_BATCH = 16


def peer(cell: Cell, name: str) -> dict[str, Any]:
    """Add up to `cell.tenants` random LoRA tenants, then answer batches of 64 requests for `cell.seconds`."""
    torch.set_num_threads(cell.threads)
    folder = Path(cell.backbone)
    base_mib = _after(lambda: load_bare(folder, torch.float32))
    begin = time.perf_counter()
    model, held = PEERS[name](folder, cell.tenants)
    add_s = time.perf_counter() - begin
    memory = memory_mib()
    added_mib = memory["rss_anon_mib"] - base_mib
    seconds, answered = _answer_batches(_batches(name, model, folder, held), cell.seconds)
    return {
        "shape": cell.shape,
        "kind": cell.kind,
        "tenants": held,
        "asked_to_hold": cell.tenants,
        "system": name,
        "popularity": "zipf",
        "requests_per_s": round(answered / sum(seconds), 1),
        "p50_ms": milliseconds(seconds, 50),
        "p99_ms": milliseconds(seconds, 99),
        "tenants_per_s": round(held / add_s, 1),
        "kib_per_tenant": round(added_mib * 1024 / held, 1),
    } | memory


def _peft(folder: Path, tenants: int) -> tuple[Any, int]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="FEATURE_EXTRACTION", r=8, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False
    )
    model = get_peft_model(load_bare(folder, torch.float32), config, adapter_name=adapter_name(0))
    held = _add(tenants, lambda t: model.add_adapter(adapter_name(t), config))
    return model.eval(), held


def _adapters(folder: Path, tenants: int) -> tuple[Any, int]:
    import adapters

    model = load_bare(folder, torch.float32)
    adapters.init(model)
    config = adapters.LoRAConfig(r=8, alpha=16, attn_matrices=["q", "v"])
    model.add_adapter(adapter_name(0), config=config)
    held = _add(tenants, lambda t: model.add_adapter(adapter_name(t), config=config))
    return model.eval(), held


PEERS: dict[str, Callable[[Path, int], tuple[Any, int]]] = {"peft mixed batch": _peft, "adapters BatchSplit": _adapters}
_SYSTEMS: dict[str, Callable[..., System]] = {"peft mixed batch": PeftMixed, "adapters BatchSplit": BatchSplit}


def _add(tenants: int, add: Callable[[int], object]) -> int:
    """Add tenants after the first until all are there or the time is up; how many there are."""
    begin = time.perf_counter()
    for t in range(1, tenants):
        if time.perf_counter() - begin > _ADD_LIMIT_S:
            return t
        add(t)
    return tenants


def _after(make: Callable[[], object]) -> int:
    """Private MiB of the process while what `make` gives is alive."""
    kept = make()
    mib = memory_mib()["rss_anon_mib"]
    del kept
    return mib


def _batches(name: str, model: Any, folder: Path, held: int) -> Iterator[System]:
    tokenizer = Tokenizer.load(folder, read_backbone(folder).config)
    words = itertools.cycle(list(itertools.islice(texts(), 512)))
    tenants = asked_for("zipf", held)
    while True:
        encoded = tokenizer.encode(list(itertools.islice(words, _BATCH)), offsets=False)
        asked = tuple(int(next(tenants)[1:]) for _ in range(_BATCH))
        requests = Requests(tuple(tuple(e.token_ids) for e in encoded), asked)
        yield _SYSTEMS[name](model, requests, _SUB_BATCH)


def _answer_batches(batches: Iterator[System], limit_s: float) -> tuple[list[float], int]:
    """Seconds of each batch, after one that is not measured, and how many requests they answered."""
    next(batches)()
    seconds: list[float] = []
    while sum(seconds) < limit_s:
        system = next(batches)
        begin = time.perf_counter()
        system()
        seconds.append(time.perf_counter() - begin)
    return seconds, len(seconds) * _BATCH
