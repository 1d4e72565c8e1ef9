"""The readers give the outputs that peft, adapters and transformers gave when the files were recorded.

Runs wherever the product runs: none of the three libraries is called.
"""

import hashlib
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vbert.arena import Arena
from vbert.checkpoint import write_tenant
from vbert.formats import read_backbone, read_tenant
from vbert.header import parse_header
from vbert.model import Model, SequenceInput
from vbert.reference import dense_forward

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-4
FOLDERS = sorted(path for path in DATA.glob("*/*") if path.is_dir())


class Golden:
    """One recorded backbone: inputs, and by folder name what the original library answered."""

    def __init__(self, root):
        self.backbone = read_backbone(root / "backbone")
        self.recorded = load_file(root / "expected.safetensors")
        self.inputs = [(self.recorded[f"token_ids.{i}"], self.recorded[f"type_ids.{i}"]) for i in range(3)]

    def expected(self, name):
        return [self.recorded[f"{name}.{i}"] for i in range(len(self.inputs))]


@pytest.fixture(scope="module")
def golden():
    return {root.name: Golden(root) for root in DATA.iterdir() if root.is_dir()}


def test_every_reader_and_type_is_recorded():
    names = {folder.name for folder in FOLDERS}
    assert {name.split("-")[0] for name in names} == {"backbone", "peft", "adapters", "transformers"}
    assert len({folder.parent.name for folder in FOLDERS}) == 5


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_as_recorded(golden, folder):
    case = golden[folder.parent.name]
    module = read_tenant(folder, case.backbone)
    for (token_ids, type_ids), expected in zip(case.inputs, case.expected(folder.name), strict=True):
        ours = dense_forward(case.backbone, module, token_ids, type_ids)
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("model_type", sorted({folder.parent.name for folder in FOLDERS}))
def test_one_packed_batch_of_all_of_them_is_as_recorded(golden, model_type, tmp_path):
    case = golden[model_type]
    model = Model.load(case.backbone, "float32", "cpu")
    arena = Arena(case.backbone.config, case.backbone.fingerprint, model.dtype, 2**24)
    sequences, expected = [], []
    for folder in (folder for folder in FOLDERS if folder.parent.name == model_type):
        data = write_tenant(read_tenant(folder, case.backbone))
        path = tmp_path / hashlib.sha256(data).hexdigest()
        path.write_bytes(data)
        tenant = arena.fill(arena.reserve(parse_header(data), path.name), path)
        sequences += [SequenceInput(ids.tolist(), types.tolist(), tenant) for ids, types in case.inputs]
        expected += case.expected(folder.name)
    for ours, recorded in zip(model.forward(model.pack(sequences)), expected, strict=True):
        assert ours.shape == recorded.shape
        assert (ours - recorded).abs().max() < TOLERANCE
