"""Tiny backbones of every type, read once a session; checkpoints made by the original libraries."""

import dataclasses

import pytest
import torch

from tests.tiny import PAIRS, TEXTS, tiny_backbone
from vbert.config import MODEL_TYPES
from vbert.formats import read_tenant
from vbert.formats.original import original_outputs
from vbert.formats.transformers_folder import read_backbone
from vbert.reference import dense_forward
from vbert.tokenizer import Tokenizer

TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Tiny:
    folder: object
    backbone: object
    inputs: list

    def outputs(self, module):
        return [dense_forward(self.backbone, module, e.token_ids, e.type_ids) for e in self.inputs]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """model type -> folder, backbone and encoded inputs."""
    root, made = tmp_path_factory.mktemp("tiny"), {}
    for model_type in MODEL_TYPES:
        folder = tiny_backbone(model_type, root / model_type)
        backbone = read_backbone(folder)
        inputs = Tokenizer.load(folder, backbone.config).encode([*TEXTS[:3], *PAIRS[:2]], max_length=40)
        made[model_type] = Tiny(folder, backbone, inputs)
    return made


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomise_trained_(model):
    """Random numbers where the library starts with zeros and ones, so that every trained tensor matters."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if any(part in name for part in ("ia3_l", "magnitude", "lora_E", "vera_lambda")):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))


def assert_equal_original(tiny, folder, **options):
    """The tenant as read gives the numbers of the library that wrote it, and they are not the bare backbone's."""
    module = read_tenant(folder, tiny.backbone, **options)
    expected = original_outputs(folder, tiny.backbone, module, tiny.inputs)
    for ours, theirs in zip(tiny.outputs(module), expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < TOLERANCE
    bare = tiny.outputs(dataclasses.replace(module, deltas=()))
    assert not module.deltas or any((a - b).abs().max() > 1e-3 for a, b in zip(bare, expected, strict=True))
    return module
