"""Every byte that lasts is counted, by what holds it."""

import torch

from tests.serving.helpers import add
from tests.tiny import TEXTS


async def test_the_parts_are_what_they_hold(serving, factory):
    async with serving(word_rows="mapped") as engine:
        await add(engine, "t", factory.tenant("lora", "diff"))
        before = engine.snapshot().memory_bytes
        await engine.classify("t", TEXTS)
        snapshot = engine.snapshot()
        model, now = engine._core.parts.model, snapshot.memory_bytes
    words = engine.config.backbone and model.config.vocab_size * model.config.hidden_size * 4
    weights = sum(t.numel() for t in encoder_tensors(model.encoder))
    assert now["backbone"] == 4 * weights
    assert now["rows"] == words
    assert (before["modules"], now["modules"]) == (0, sum(snapshot.resident_bytes.values()))
    assert now["activations"] > 0
    assert now["staging"] > 0
    assert now["host_modules"] == 0


async def test_word_embeddings_in_memory_belong_to_the_backbone(serving):
    async with serving() as engine:
        model, now = engine._core.parts.model, engine.snapshot().memory_bytes
    assert now["rows"] == 0
    assert now["backbone"] > model.config.vocab_size * model.config.hidden_size * 4


def encoder_tensors(encoder):
    """Found another way: through every object that can be reached."""
    seen, found, left = set(), [], [vars(encoder)]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
        elif type(value).__module__ == "vbert.encoder":
            left += [getattr(value, name) for name in value.__slots__]
    return found
