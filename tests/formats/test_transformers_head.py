"""A whole `transformers` model: over the backbone's encoder a head-only tenant, else one with weights of its own."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.conftest import assert_equal_original
from tests.tiny import tiny_backbone
from vbert.config import MODEL_TYPES
from vbert.errors import CorruptFile, RefusedCheckpoint
from vbert.formats import read_backbone, read_tenant
from vbert.tenant import OwnWeights


def save(tiny, folder, head, **options):
    import transformers

    model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tiny.folder, **options)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_heads_equal_transformers(tiny, tmp_path, model_type, head):
    save(tiny[model_type], tmp_path, head, id2label={0: "a", 1: "b", 2: "c"})
    module = assert_equal_original(tiny[model_type], tmp_path)
    assert module.deltas == ()
    assert module.head.labels == ("a", "b", "c")
    assert module.head.shared_pooler == (model_type == "bert" and head == "SequenceClassification")


@pytest.mark.parametrize(
    ("problem", "ours"), [("multi_label_classification", "multi_label"), ("regression", "regression")]
)
def test_problem_types(tiny, tmp_path, problem, ours):
    save(tiny["bert"], tmp_path, "SequenceClassification", num_labels=4, problem_type=problem)
    assert assert_equal_original(tiny["bert"], tmp_path).head.problem == ours


def test_a_trained_pooler_is_stored_with_the_head(tiny, tmp_path):
    save(tiny["bert"], tmp_path, "SequenceClassification", num_labels=2)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["bert.pooler.dense.weight"] += 0.1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    module = assert_equal_original(tiny["bert"], tmp_path)
    assert not module.head.shared_pooler
    assert len(module.head.layers) == 2


def test_one_logit_reranks(tiny, tmp_path):
    save(tiny["bert"], tmp_path, "SequenceClassification", num_labels=1)
    assert assert_equal_original(tiny["bert"], tmp_path, task="rerank").head.kind == "rerank"


def test_a_bare_encoder_with_other_pooling_embeds(tiny, tmp_path):
    folder = tiny_backbone("bert", tmp_path)
    modules = [("Transformer", ""), ("Pooling", "p")]
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in modules]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "p").mkdir()
    (folder / "p" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert assert_equal_original(tiny["bert"], folder).head.pooling == "cls"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_a_fully_fine_tuned_model_equals_transformers(tiny, tmp_path, model_type, head):
    """Every weight differs, the pooler's too."""
    other = tiny_backbone(model_type, tmp_path / "other", seed=5)
    import transformers

    getattr(transformers, f"AutoModelFor{head}").from_pretrained(other, num_labels=3).save_pretrained(tmp_path / "own")
    module = assert_equal_original(tiny[model_type], tmp_path / "own")
    assert {type(delta) for delta in module.deltas} == {OwnWeights}
    assert not module.head.shared_pooler


def test_an_encoder_of_another_shape_is_refused(tiny, tmp_path):
    with pytest.raises(RefusedCheckpoint, match="model_type is 'roberta'"):
        read_tenant(tiny["roberta"].folder, tiny["bert"].backbone)
    same = tiny_backbone("bert", tmp_path / "eps", layer_norm_eps=1e-5)
    with pytest.raises(RefusedCheckpoint, match="layer_norm_eps is 1e-05"):
        read_tenant(same, tiny["bert"].backbone)


def test_other_heads_are_refused_by_name(tiny, tmp_path):
    save(tiny["bert"], tmp_path / "qa", "QuestionAnswering")
    with pytest.raises(RefusedCheckpoint, match="BertForQuestionAnswering"):
        read_tenant(tmp_path / "qa", tiny["bert"].backbone)
    save(tiny["bert"], tmp_path / "c", "SequenceClassification", num_labels=2)
    tensors = load_file(tmp_path / "c" / "model.safetensors") | {"extra.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    with pytest.raises(RefusedCheckpoint, match=r"extra\.weight"):
        read_tenant(tmp_path / "c", tiny["bert"].backbone)


@pytest.mark.parametrize(
    ("labels", "error", "text"),
    [
        ({"0": "a", "1": "b"}, RefusedCheckpoint, "names 2 labels and the head has 3 outputs, .* class 2"),
        ({"0": "a", "2": "b", "3": "c"}, RefusedCheckpoint, "differ at class 1; name the classes 0 to 2"),
        ({"zero": "a", "1": "b", "2": "c"}, CorruptFile, "id2label .*'zero'"),
        (["a", "b", "c"], CorruptFile, r"id2label \['a', 'b', 'c'\]"),
    ],
)
def test_labels_that_are_not_one_a_class(tiny, tmp_path, labels, error, text):
    save(tiny["bert"], tmp_path, "SequenceClassification", id2label={0: "a", 1: "b", 2: "c"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": labels}))
    with pytest.raises(error, match=text):
        read_tenant(tmp_path, tiny["bert"].backbone)


def test_a_head_over_a_backbone_folder_is_its_own_tenant(tmp_path):
    """The backbone's folder may itself be a classifier's."""
    tiny_backbone("distilbert", tmp_path / "b")
    from transformers import AutoModelForTokenClassification

    AutoModelForTokenClassification.from_pretrained(tmp_path / "b", num_labels=2).save_pretrained(tmp_path / "b")
    backbone = read_backbone(tmp_path / "b")
    assert read_tenant(tmp_path / "b", backbone).head.kind == "token_classify"
