"""A fully fine-tuned model as a tenant: exact where the change is small in rank or number, told where it is not."""

from __future__ import annotations

import pytest
import torch

from training.compare_answers import compare_answers
from vbert.checkpoint import write_tenant
from vbert.config import MODEL_TYPES
from vbert.errors import RefusedCheckpoint
from vbert.formats import read_tenant
from vbert.formats.compressed import Compression, compress_folder, worst
from vbert.reference import dense_forward
from vbert.tenant import Affine, LowRank, Norm, OwnWeights, Sparse
from vbert.tokenizer import Tokenizer

TEXTS = ["one text", "another one, a little longer", ("a pair", "of texts")]


@pytest.fixture
def bases(tiny):
    """model type -> backbone."""
    return {model_type: each.backbone for model_type, each in tiny.items()}


def fine_tuned(source, folder, change, head="SequenceClassification"):
    """The model of `transformers` with the weights that `change(name, weight)` gives; returns its folder."""
    import transformers

    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    model = auto.from_pretrained(source.folder, **({"num_labels": 3} if head else {}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if (changed := change(name, weight)) is not None:
                weight.copy_(changed)
    model.save_pretrained(folder)
    return folder


def is_linear(name, weight):
    return weight.ndim == 2 and "embeddings" not in name and "classifier" not in name and "pooler" not in name


def low_rank(name, weight):
    torch.manual_seed(sum(name.encode()))
    if is_linear(name, weight) and "relative" not in name:
        return weight + 0.3 * torch.randn(weight.shape[0], 3) @ torch.randn(3, weight.shape[1]) / 6
    return weight + 0.1 * torch.randn_like(weight) if weight.ndim == 1 else None


def full_rank(name, weight):
    torch.manual_seed(len(name))
    return weight + 0.05 * torch.randn_like(weight) if is_linear(name, weight) else None


def nearness(backbone, compressed, texts=TEXTS):
    inputs = Tokenizer.load(backbone.folder, backbone.config).encode(texts, offsets=False)
    return compare_answers((backbone, compressed.module), (compressed.original, compressed.whole), inputs)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_change_of_low_rank_is_kept_whole_with_biases_norms_and_head(bases, tmp_path, model_type):
    backbone = bases[model_type]
    folder = fine_tuned(backbone, tmp_path, low_rank)
    compressed = compress_folder(folder, backbone, Compression(max_error=1e-4))
    kinds = {type(delta) for delta in compressed.module.deltas}
    assert kinds == {LowRank, Affine, Norm}
    assert {loss.size for loss in compressed.losses} == {3}
    assert compressed.error < 1e-4
    found = nearness(backbone, compressed)
    assert found["same_label"] == 1
    assert found["probability_max"] < 1e-3


def test_a_few_changed_weights_are_kept_whole(bases, tmp_path):
    def change(name, weight):
        changed = weight.clone()
        changed.view(-1)[::50] += 0.5
        return changed if is_linear(name, weight) else None

    compressed = compress_folder(fine_tuned(bases["bert"], tmp_path, change), bases["bert"], Compression())
    assert {type(delta) for delta in compressed.module.deltas} == {Sparse}
    assert compressed.error == 0
    assert nearness(bases["bert"], compressed)["probability_max"] < 1e-5


def test_a_change_of_full_rank_loses_what_is_told(bases, tmp_path):
    """The lost part of each weight is what the original lacks next to the kept one, and a lower rank loses more."""

    folder, backbone = fine_tuned(bases["bert"], tmp_path, full_rank), bases["bert"]
    errors = {}
    for rank in (2, 8, 32):
        compressed = compress_folder(folder, backbone, Compression(max_rank=rank, max_error=0.0))
        delta, loss = compressed.module.deltas[0], compressed.losses[0]
        assert loss.weight == f"layers.{delta.layer}.{delta.site}"
        whole = compressed.original.weights[f"{loss.weight}.weight"] - backbone.weights[f"{loss.weight}.weight"]
        assert loss.change == pytest.approx(float(whole.norm()), rel=1e-4)
        assert loss.error == pytest.approx(float((whole - (delta.a @ delta.b).T).norm() / whole.norm()), abs=1e-4)
        errors[rank] = compressed.error
    assert errors[2] > errors[8] > errors[32] == pytest.approx(0, abs=1e-4)
    assert worst(compress_folder(folder, backbone, Compression(max_rank=2)).losses).error > 0.5
    few = compress_folder(folder, backbone, Compression(max_error=0.5))
    assert few.error == pytest.approx(0.5, abs=0.05)
    assert {loss.size for loss in few.losses} != {32}


def test_without_ranks_the_largest_changes_are_kept(bases, tmp_path):
    folder, backbone = fine_tuned(bases["bert"], tmp_path, full_rank), bases["bert"]
    errors = []
    for density in (0.0, 0.1, 0.5):
        compressed = compress_folder(folder, backbone, Compression(max_rank=0, max_density=density))
        delta, loss = compressed.module.deltas[0], compressed.losses[0]
        assert {type(each) for each in compressed.module.deltas} == {Sparse}
        assert len(delta.values) == loss.size == max(1, int(density * 32 * 32))
        whole = compressed.original.weights[f"{loss.weight}.weight"] - backbone.weights[f"{loss.weight}.weight"]
        left = whole.abs().flatten().sort(descending=True).values[loss.size :]
        assert float(delta.values.abs().min()) >= float(left.max())
        assert loss.error == pytest.approx(float(left.norm() / whole.norm()), abs=1e-4)
        errors.append(compressed.error)
    assert errors[0] > errors[1] > errors[2]


def test_embeddings_stay_the_backbones_and_that_is_told(bases, tmp_path):
    folder = fine_tuned(
        bases["bert"], tmp_path, lambda name, weight: weight.roll(1, 0) if "word_embed" in name else None
    )
    compressed = compress_folder(folder, bases["bert"], Compression())
    assert [(loss.weight, loss.kind, loss.error) for loss in compressed.losses] == [("word_embeddings", "dropped", 1.0)]
    assert compressed.error == 1
    assert nearness(bases["bert"], compressed)["probability_max"] > 0


def test_the_whole_model_is_that_of_transformers(bases, tmp_path):
    """What the loss is told against: the original encoder with the tenant's head, and a pooler of its own."""
    import transformers

    folder = fine_tuned(bases["bert"], tmp_path, lambda name, weight: weight + 0.02)
    compressed = compress_folder(folder, bases["bert"], Compression())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    (encoded,) = Tokenizer.load(bases["bert"].folder, bases["bert"].config).encode(["one text"], offsets=False)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([encoded.token_ids])).logits[0]
    got = dense_forward(compressed.original, compressed.whole, encoded.token_ids, encoded.type_ids)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head", ["TokenClassification", ""])
def test_taggers_and_embedders_are_compared_too(bases, tmp_path, head):
    folder = fine_tuned(bases["bert"], tmp_path, low_rank, head)
    found = nearness(bases["bert"], compress_folder(folder, bases["bert"], Compression(max_error=1e-4)))
    assert found["texts"] == 3
    assert found.get("same_label", 1) == 1
    assert found.get("cosine_min", 1) > 0.9999


def test_a_pooler_that_the_folder_left_out_is_the_backbones(bases, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = fine_tuned(
        bases["bert"], tmp_path, lambda name, weight: low_rank(name, weight) if "pooler" not in name else None
    )
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    compressed = compress_folder(folder, bases["bert"], Compression(max_error=1e-4))
    assert compressed.module.head.shared_pooler
    assert nearness(bases["bert"], compressed)["probability_max"] < 1e-3


def test_an_encoder_of_another_shape_is_refused(bases, tmp_path):
    folder = fine_tuned(bases["roberta"], tmp_path, lambda name, weight: None)
    with pytest.raises(RefusedCheckpoint, match="model_type is 'roberta', the backbone's is 'bert'"):
        compress_folder(folder, bases["bert"], Compression())


@pytest.mark.parametrize("wrong", [{"max_rank": -1}, {"max_error": 1.0}, {"max_density": -0.1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(RefusedCheckpoint, match="give a rank of at least 0"):
        Compression(**wrong)


def test_it_is_smaller_than_the_whole_model(bases, tmp_path):
    backbone = bases["bert"]
    folder = fine_tuned(backbone, tmp_path, low_rank)
    whole, small = read_tenant(folder, backbone), compress_folder(folder, backbone, Compression()).module
    assert {type(delta) for delta in whole.deltas} == {OwnWeights}
    assert len(write_tenant(small)) < len(write_tenant(whole)) / 2
