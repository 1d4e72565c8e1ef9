"""Lanes, mapped word embeddings and the trace, through a whole engine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from runtime import EngineConfig
from runtime.trace import LANES
from tests.serving.helpers import Dense, add
from vbert.errors import ConfigError, CorruptFile

TEXTS = ["the cat sat on the mat", "no"]


async def answers(serving, factory, **options):
    async with serving(**options) as engine:
        for i, module in enumerate(factory):
            await add(engine, f"t{i}", module)
        results = await asyncio.gather(*(engine.classify(f"t{i}", TEXTS) for i in range(len(factory))))
        return [result.probabilities for result in results]


@pytest.fixture(scope="module")
def tenants(factory):
    return [factory.tenant("lora"), factory.tenant("houlsby")]


@pytest.mark.parametrize("lanes", [("none",), ("rows",), ("rows", "modules", "compute")], ids=",".join)
@pytest.mark.parametrize("word_rows", ["memory", "mapped"])
async def test_every_setting_answers_as_the_dense_reference(serving, tenants, backbone, lanes, word_rows):
    got = await answers(serving, tenants, lanes=lanes, word_rows=word_rows)
    for probabilities, module in zip(got, tenants, strict=True):
        np.testing.assert_allclose(probabilities, Dense(backbone).probabilities(module, TEXTS), atol=1e-4)


def table(store) -> Path:
    (path,) = Path(store).glob("words-*.safetensors")
    return path


async def test_the_table_is_written_once(serving, config):
    async with serving(word_rows="mapped"):
        path = table(config().store)
        written = path.stat()
        assert path.name.endswith("-float32.safetensors")
    async with serving(word_rows="mapped"):
        assert table(config().store).stat() == written


async def test_a_damaged_table_stops_the_start_with_the_remedy(serving, config):
    async with serving(word_rows="mapped"):
        path = table(config().store)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptFile, match="delete it"):
        async with serving(word_rows="mapped"):
            pass
    path.unlink()
    async with serving(word_rows="mapped"):
        assert path.exists()


async def test_the_trace_has_what_every_lane_did(serving, tenants, tmp_path):
    path = tmp_path / "trace.json"
    await answers(serving, tenants, trace=str(path), word_rows="mapped")
    spans = [event for event in json.loads(path.read_text()) if event["ph"] == "X"]
    lanes = {LANES[span["tid"]] for span in spans}
    assert lanes == {"rows", "compute", "results"}  # modules are read into their slots where there is no device
    rows, compute = ([s for s in spans if LANES[s["tid"]] == lane] for lane in ("rows", "compute"))
    batches = [span for span in compute if span["name"].startswith("batch")]
    assert {span["name"] for span in rows} == {span["name"] for span in batches}
    assert all(span["args"]["tokens"] > 0 for span in batches)
    assert {span["name"] for span in compute} - {span["name"] for span in batches} == {"wait for rows"}


async def test_a_trace_that_cannot_be_written_stops_the_start(serving, tmp_path):
    with pytest.raises(ConfigError, match="trace file"):
        async with serving(trace=str(tmp_path / "absent" / "trace.json")):
            pass


@pytest.mark.parametrize("wrong", [{"lanes": ("row",)}, {"lanes": ()}, {"lanes": ("none", "rows")}, {"word_rows": "x"}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineConfig(**wrong)
