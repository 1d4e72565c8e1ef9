"""`inspect` says what is in a checkpoint and never raises for what is refused; native files round trip."""

import json

import pytest
import torch

from tests.formats.conftest import assert_equal_original, randomise_trained_
from vbert.checkpoint import write_tenant
from vbert.errors import CorruptFile, RefusedCheckpoint, WrongBackbone
from vbert.formats import inspect, read_tenant
from vbert.formats.native import bias_to_affine, diff_to_sparse, mask_to_sparse
from vbert.formats.original import self_tests
from vbert.formats.transformers_folder import read_backbone
from vbert.tenant import Dense, Head, TenantModule

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own remarks on how it is used


def native_module(backbone, generator):
    """BitFit, MaskBert and Diff together, with a head."""

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    weights, deltas = backbone.weights, []
    for layer in range(backbone.config.num_layers):
        key = f"layers.{layer}.q"
        deltas.append(bias_to_affine(weights[f"{key}.bias"], rand(32), layer=layer, site="q"))
        deltas.append(mask_to_sparse(weights[f"{key}.weight"], rand(32, 32) > 0.1, layer=layer, site="q"))
        deltas.append(diff_to_sparse(rand(32, 64) * (rand(32, 64) > 0.9), layer=layer, site="ffn_down"))
    head = Head(kind="classify", layers=(Dense(weight=rand(3, 32), bias=rand(3)),), labels=("a", "b", "c"))
    return TenantModule(
        backbone_fingerprint=backbone.fingerprint, deltas=tuple(deltas), head=head, source={"method": "test"}
    )


@pytest.fixture
def peft_adapter(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(tiny["bert"].folder, num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, use_rslora=True, target_modules=["query", "value"])
    model = peft.get_peft_model(base, config)
    randomise_trained_(model)
    model.save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def test_masks_diffs_and_biases_are_the_dense_weights_they_mean(tiny):
    from dataclasses import replace

    backbone, generator = tiny["bert"].backbone, torch.Generator().manual_seed(3)
    weights = dict(backbone.weights)
    mask = (torch.rand(32, 32, generator=generator) > 0.3).float()
    diff = torch.randn(64, 32, generator=generator) * (torch.rand(64, 32, generator=generator) > 0.8)
    bias = torch.randn(32, generator=generator)
    deltas = (
        mask_to_sparse(weights["layers.1.k.weight"], mask, layer=1, site="k"),
        diff_to_sparse(diff, layer=0, site="ffn_up"),
        bias_to_affine(weights["layers.0.v.bias"], bias, layer=0, site="v"),
    )
    weights["layers.1.k.weight"] = weights["layers.1.k.weight"] * mask
    weights["layers.0.ffn_up.weight"] = weights["layers.0.ffn_up.weight"] + diff
    weights["layers.0.v.bias"] = bias
    tuned = tiny["bert"].__class__(None, replace(backbone, weights=weights), tiny["bert"].inputs)
    head = backbone.embed_head
    module = TenantModule(backbone_fingerprint="", deltas=deltas, head=head)
    for ours, dense in zip(tiny["bert"].outputs(module), tuned.outputs(None), strict=True):
        assert (ours - dense).abs().max() < 1e-5
    assert deltas[0].columns.dtype == deltas[0].row_starts.dtype == torch.int32
    assert len(deltas[0].values) == int((1 - mask).sum())


def test_nothing_changed_is_no_delta():
    assert mask_to_sparse(torch.randn(4, 3), torch.ones(4, 3), layer=0, site="q") is None
    assert diff_to_sparse(torch.zeros(4, 3), layer=0, site="q") is None


def test_native_files_round_trip_and_know_their_backbone(tiny, tmp_path):
    backbone = tiny["bert"].backbone
    module = native_module(backbone, torch.Generator().manual_seed(0))
    path = tmp_path / "t.safetensors"
    path.write_bytes(write_tenant(module))
    again = read_tenant(path, backbone)
    for first, second in zip(tiny["bert"].outputs(module), tiny["bert"].outputs(again), strict=True):
        assert torch.equal(first, second)
    with pytest.raises(WrongBackbone):
        read_tenant(path, tiny["roberta"].backbone)
    with pytest.raises(RefusedCheckpoint, match="classify head, not embed"):
        read_tenant(path, backbone, task="embed")
    report = inspect(path, backbone)
    assert report["format"] == "native"
    assert report["deltas"] == {"affine": 2, "sparse": 4}
    assert report["bytes"] == path.stat().st_size
    assert self_tests(path, backbone, again) == ()
    path.write_bytes(path.read_bytes()[:-8])
    assert inspect(path, backbone)["refused"]
    with pytest.raises(CorruptFile):
        read_tenant(path, backbone)


def test_inspect_a_peft_folder(tiny, peft_adapter):
    bare = inspect(peft_adapter)
    assert (bare["format"], bare["method"], bare["refused"]) == ("peft", "LORA", [])
    assert bare["honoured"]["use_rslora"] is True
    assert bare["bytes"] == (peft_adapter / "adapter_model.safetensors").stat().st_size
    assert (bare["tensors"], bare["parameters"]) == (10, 2 * 2 * 2 * 4 * 32 + 3 * 33)
    full = inspect(peft_adapter, tiny["bert"].backbone)
    assert full["deltas"] == {"low_rank": 4}
    assert full["layers"] == [0, 1]
    assert full["head"]["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert full["module_bytes"]["float32"] == 2 * full["module_bytes"]["bfloat16"] == 4 * 4 * 2 * 4 * 32
    assert inspect(peft_adapter, tiny["roberta"].backbone)["refused"]
    json.dumps(full)


def test_inspect_names_every_refusal(peft_adapter):
    path = peft_adapter / "adapter_config.json"
    changes = {"use_qalora": True, "init_lora_weights": "pissa", "task_type": "CAUSAL_LM"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused = inspect(peft_adapter)["refused"]
    assert len(refused) == 3
    assert all(any(key in text for text in refused) for key in changes)


def test_inspect_an_adapterhub_folder(tiny, tmp_path):
    adapters = pytest.importorskip("adapters")
    model = adapters.AutoAdapterModel.from_pretrained(tiny["bert"].folder)
    model.add_adapter("t", config="double_seq_bn")
    model.add_tagging_head("t", num_labels=5)
    model.save_adapter(str(tmp_path), "t", use_safetensors=True)
    report = inspect(tmp_path, tiny["bert"].backbone)
    assert (report["format"], report["method"], report["deltas"]) == ("adapters", "houlsby", {"bottleneck": 4})
    assert report["head"]["kind"] == "token_classify"
    stated = json.loads((tmp_path / "adapter_config.json").read_text())
    stated["config"] |= {"ln_before": True, "use_gating": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stated))
    assert len(inspect(tmp_path)["refused"]) == 2


def test_inspect_a_transformers_folder_and_nothing(tiny, tmp_path):
    report = inspect(tiny["bert"].folder, tiny["bert"].backbone)
    assert (report["format"], report["method"], report["head"]["kind"]) == ("transformers", "BertModel", "embed")
    assert inspect(tmp_path)["refused"]
    assert inspect(tmp_path / "nowhere", tiny["bert"].backbone)["refused"]


def test_a_named_peft_adapter_in_a_folder_below(tiny, tmp_path, peft_adapter):
    peft_adapter.rename(tmp_path / "outer-mine")
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer-mine").rename(tmp_path / "outer" / "mine")
    assert assert_equal_original(tiny["bert"], tmp_path / "outer").source["format"] == "peft"
    (tmp_path / "outer" / "other").mkdir()
    (tmp_path / "outer" / "other" / "adapter_config.json").write_text("{}")
    with pytest.raises(RefusedCheckpoint, match="mine, other"):
        read_tenant(tmp_path / "outer", tiny["bert"].backbone)


def test_unknown_task_and_broken_config(tiny, peft_adapter):
    with pytest.raises(RefusedCheckpoint, match="'translate' is unknown"):
        read_tenant(peft_adapter, tiny["bert"].backbone, task="translate")
    (peft_adapter / "adapter_config.json").write_text("{nope")
    with pytest.raises(CorruptFile, match="not JSON"):
        read_tenant(peft_adapter, tiny["bert"].backbone)
    assert "not JSON" in inspect(peft_adapter)["refused"][0]


def test_self_tests_come_from_the_original_library(tiny, peft_adapter):
    module = assert_equal_original(tiny["bert"], peft_adapter)
    tests = self_tests(peft_adapter, tiny["bert"].backbone, module)
    assert len(tests) == 3
    assert tests[0].expected.shape == (3,)
    assert tests[1].type_ids.max() == 1


def test_a_wrong_reading_is_found_at_import(tiny, peft_adapter):
    from dataclasses import replace

    from vbert.errors import SelfTestFailed

    module = read_tenant(peft_adapter, tiny["bert"].backbone)
    wrong = replace(module.head, layers=(replace(module.head.layers[0], bias=torch.ones(3)),))
    with pytest.raises(SelfTestFailed, match="peft's own output"):
        self_tests(peft_adapter, tiny["bert"].backbone, replace(module, head=wrong))
    assert read_backbone(tiny["bert"].folder).fingerprint == module.backbone_fingerprint
