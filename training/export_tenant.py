"""A trained model into a native tenant file, with self-test vectors from the training forward.

The vectors are what the server replays before it trusts a loaded tenant. They come from the autograd model in fp32 on
the CPU, one sequence at a time, never from the path that serves.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from training.data import Example
from training.model import PaddedBatch, TenantModel
from vbert.checkpoint import write_tenant
from vbert.formats.transformers_folder import Backbone
from vbert.tenant import SelfTest, TenantModule

__all__ = ["NUM_SELF_TESTS", "export", "self_tests", "write"]

NUM_SELF_TESTS = 4


def export(
    model: TenantModel,
    backbone: Backbone,
    examples: Sequence[Example],
    source: dict[str, Any],
    exit_threshold: float = 1.0,
) -> TenantModule:
    """The tenant of a trained model, which is moved to the CPU; `examples` are those to choose self-tests from."""
    model.cpu().eval()
    skip = backbone.skip if model.paths != ("plain",) else None
    return TenantModule(
        backbone_fingerprint=backbone.fingerprint if skip is None or "plain" in model.paths else skip.fingerprint,
        paths=model.paths,
        skip_fingerprint="" if skip is None else skip.fingerprint,
        deltas=tuple(delta.export() for delta in model.trainables),
        head=model.head.export(),
        self_tests=self_tests(model, examples),
        exits=model.exported_exits(),
        exit_threshold=exit_threshold,
        source=source,
    )


@torch.no_grad()
def self_tests(model: TenantModel, examples: Sequence[Example]) -> tuple[SelfTest, ...]:
    """Up to NUM_SELF_TESTS examples spread over the lengths, with the model's own outputs in fp32, for each path; one
    for each of its exits."""
    ordered = sorted(examples, key=lambda example: len(example.token_ids))
    last = max(1, min(NUM_SELF_TESTS, len(ordered)) - 1)
    chosen = {round(i * (len(ordered) - 1) / last) for i in range(last + 1)}
    of_head = [_self_test(model, ordered[i], path) for path in model.paths for i in sorted(chosen)]
    middle = ordered[len(ordered) // 2]
    return (*of_head, *(_self_test(model, middle, path, i) for path in model.paths for i in model.exit_layers))


def _self_test(model: TenantModel, example: Example, path: str, exit_layer: int = 0) -> SelfTest:
    token_ids, type_ids = example.token_ids[None], example.type_ids[None]
    batch = PaddedBatch(
        mask=torch.ones_like(token_ids, dtype=torch.bool),
        token_ids=token_ids,
        type_ids=type_ids,
        path=path,
        kept=3 - torch.arange(token_ids.shape[1])[None] % 3 if path == "backoff" else None,
    )
    outputs = dict(zip((*model.exit_layers, 0), model.outputs(batch), strict=True))
    expected = outputs[exit_layer][0].clone()
    return SelfTest(
        token_ids=example.token_ids, type_ids=example.type_ids, expected=expected, path=path, exit=exit_layer
    )


def write(module: TenantModule, path: Path) -> int:
    """Write the native file and return its bytes. A reader sees the old file or the whole new one, never a part."""
    data = write_tenant(module)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return len(data)
