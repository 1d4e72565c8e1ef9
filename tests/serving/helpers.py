"""What several serving tests do: dense answers, waiting for a state, damaging a stored file."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager

import numpy as np

from vbert.checkpoint import write_tenant
from vbert.reference import dense_forward
from vbert.tokenizer import Tokenizer


class Dense:
    """Answers of the dense reference for the same inputs."""

    def __init__(self, backbone) -> None:
        self.backbone = backbone
        self.tokenizer = Tokenizer.load(backbone.folder, backbone.config)

    def raw(self, module, inputs) -> list[np.ndarray]:
        encoded = self.tokenizer.encode(inputs)
        return [dense_forward(self.backbone, module, e.token_ids, e.type_ids).numpy() for e in encoded]

    def probabilities(self, module, inputs) -> np.ndarray:
        raw = np.stack(self.raw(module, inputs))
        if module.head.problem == "regression":
            return raw
        if module.head.problem == "multi_label":
            return 1 / (1 + np.exp(-raw))
        return softmax(raw)


def softmax(raw: np.ndarray) -> np.ndarray:
    exponents = np.exp(raw - raw.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


async def add(engine, tenant: str, module) -> None:
    await engine.add_tenant(tenant, write_tenant(module))


async def until(condition) -> None:
    """Let the loop run until the condition holds; a test that never gets there is ended by its time limit."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (anything may change it, not one event)
            await asyncio.sleep(0.001)


async def waiting(engine, count: int) -> None:
    """Until that many inputs wait in the queue."""
    await until(lambda: engine.snapshot().queue_inputs == count)


@contextmanager
def held(lane, num_threads: int = 1):
    """Keep the threads of a lane busy until the function given is called, or the block ends."""
    release = threading.Event()
    busy = [lane.submit(release.wait) for _ in range(num_threads)]
    try:
        yield release.set
    finally:
        release.set()
    assert all(future.result() for future in busy)


async def outcome(awaitable):
    """The result, or the error instead of raising it."""
    return (await asyncio.gather(awaitable, return_exceptions=True))[0]
