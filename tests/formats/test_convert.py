"""Tenant files in bfloat16: half the bytes, the answers of the rounded module, and refused where rounding hurts."""

import pytest
import torch

from tests.formats.conftest import TOLERANCE
from vbert.checkpoint import read_tenant_bytes
from vbert.errors import SelfTestFailed
from vbert.formats.convert import check_native, to_native
from vbert.header import parse_header
from vbert.reference import dense_forward

peft = pytest.importorskip("peft")


@pytest.fixture
def folder(tiny, tmp_path):
    """change(state dict) -> a PEFT folder with random low-rank numbers, changed."""
    from transformers import AutoModel

    def write(change=lambda name, tensor: tensor):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
        model = peft.get_peft_model(AutoModel.from_pretrained(tiny["bert"].folder), config)
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.data = change(name, tensor.data)
        model.save_pretrained(tmp_path / "lora")
        return tmp_path / "lora"

    return write


def test_half_the_bytes_and_the_answers_of_the_rounded_module(tiny, folder):
    backbone, path = tiny["bert"].backbone, folder()
    exact, rounded = to_native(path, backbone), to_native(path, backbone, dtype="bfloat16")
    header = check_native(rounded, backbone)
    assert header.dtype == torch.bfloat16
    stored = header.tensors["delta.low_rank"]
    assert stored.num_bytes * 2 == parse_header(exact).tensors["delta.low_rank"].num_bytes
    module = read_tenant_bytes(rounded)
    assert module.self_tests
    for test, original in zip(module.self_tests, read_tenant_bytes(exact).self_tests, strict=True):
        answer = dense_forward(backbone, module, test.token_ids, test.type_ids)
        torch.testing.assert_close(answer, test.expected, atol=TOLERANCE, rtol=0)
        assert not torch.equal(test.expected, original.expected)


def test_a_module_that_rounding_changes_is_refused(tiny, folder):
    """Two ranks that nearly cancel: 1000.0 and -1000.7 are one number in bfloat16."""

    def cancel(name, tensor):
        if "lora_A" in name:
            tensor[1] = -tensor[0] * 1.0007
            return tensor * 1_000
        tensor[:, 1] = tensor[:, 0]
        return tensor * 10

    path, backbone = folder(cancel), tiny["bert"].backbone
    to_native(path, backbone)
    with pytest.raises(SelfTestFailed, match="is off by"):
        to_native(path, backbone, dtype="bfloat16")
