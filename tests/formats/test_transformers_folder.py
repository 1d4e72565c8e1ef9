"""Backbones as read equal `transformers` on the same folder; what would change the function is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import PAIRS, TEXTS, tiny_backbone
from vbert.config import MODEL_TYPES
from vbert.errors import CorruptFile, RefusedCheckpoint
from vbert.formats.transformers_folder import read_backbone
from vbert.reference import dense_forward, dense_hidden
from vbert.tokenizer import Tokenizer

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("backbones")
    return {model_type: tiny_backbone(model_type, root / model_type) for model_type in MODEL_TYPES}


def last_hidden(model, encoded):
    names = {"input_ids": encoded.token_ids, "token_type_ids": encoded.type_ids}
    if model.config.model_type in ("distilbert", "mpnet"):
        del names["token_type_ids"]
    return model(**{name: torch.tensor([ids]) for name, ids in names.items()}).last_hidden_state[0]


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_last_hidden_states_equal_transformers(folders, model_type):
    from transformers import AutoModel

    backbone = read_backbone(folders[model_type])
    model = AutoModel.from_pretrained(folders[model_type]).eval()
    pad = backbone.config.pad_token_id
    inputs = [*TEXTS, *PAIRS, list(range(5, 5 + backbone.config.max_length)), [5, 6, pad, 7, pad]]
    for encoded in Tokenizer.load(folders[model_type], backbone.config).encode(inputs, max_length=64):
        expected = last_hidden(model, encoded)
        ours = dense_hidden(backbone, None, encoded.token_ids, encoded.type_ids)
        assert (ours - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_mpnet_distances_past_the_last_bucket(tmp_path):
    from transformers import AutoModel

    folder = tiny_backbone("mpnet", tmp_path, positions=202)
    model, backbone = AutoModel.from_pretrained(folder).eval(), read_backbone(folder)
    ids = [2 + i % 250 for i in range(200)]
    expected = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    assert (dense_hidden(backbone, None, ids, [0] * 200) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu", "swish", "tanh", "gelu_pytorch_tanh", "linear"])
@torch.no_grad()
def test_activations_equal_transformers(tmp_path, activation):
    from transformers import AutoModel

    folder = tiny_backbone("bert", tmp_path, hidden_act=activation)
    model, backbone = AutoModel.from_pretrained(folder).eval(), read_backbone(folder)
    expected = model(input_ids=torch.tensor([[4, 5, 6]])).last_hidden_state[0]
    assert (dense_hidden(backbone, None, [4, 5, 6], [0, 0, 0]) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_head_and_a_prefix_change_nothing(folders, tmp_path, model_type):
    from transformers import AutoModelForTokenClassification

    AutoModelForTokenClassification.from_pretrained(folders[model_type], num_labels=5).save_pretrained(tmp_path)
    plain, headed = read_backbone(folders[model_type]), read_backbone(tmp_path)
    assert not headed.config.has_pooler
    assert plain.weights.keys() - headed.weights.keys() <= {"pooler.weight", "pooler.bias"}
    assert all(torch.equal(headed.weights[name], plain.weights[name]) for name in headed.weights)


def test_shards_and_old_names_give_the_same_fingerprint(folders, tmp_path):
    from transformers import AutoModel

    AutoModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    tiny_backbone("bert", tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in tensors.items()}
    old["embeddings.position_ids"] = torch.arange(66)[None]
    save_file(old, tmp_path / "old" / "model.safetensors")
    prints = {read_backbone(folder).fingerprint for folder in (folders["bert"], tmp_path / "shards", tmp_path / "old")}
    assert len(prints) == 1


def test_fingerprint_follows_weights_and_numbers(folders, tmp_path):
    prints = {read_backbone(folder).fingerprint for folder in folders.values()}
    prints.add(read_backbone(tiny_backbone("bert", tmp_path / "seed", seed=1)).fingerprint)
    prints.add(read_backbone(tiny_backbone("bert", tmp_path / "eps", layer_norm_eps=1e-6)).fingerprint)
    assert len(prints) == len(MODEL_TYPES) + 2
    assert all(len(p) == len("sha256:") + 64 for p in prints)


def test_name_is_from_the_config_else_the_folder(folders, tmp_path):
    assert read_backbone(folders["bert"]).name == "bert"
    edit_config(tiny_backbone("bert", tmp_path), _name_or_path="someone/tiny-bert")
    assert read_backbone(tmp_path).name == "tiny-bert"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoModel": "modeling_evil.Evil"}),
        ("model_type", "gpt2"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("quantization_config", {"load_in_8bit": True}),
        ("pruned_heads", {"0": [1]}),
        ("hidden_act", "quick_gelu"),
        ("relative_attention_num_buckets", 16),
        ("num_hidden_layers", None),
    ],
)
def test_refused_by_name(tmp_path, key, value):
    edit_config(tiny_backbone("bert", tmp_path), **{key: value})
    with pytest.raises(RefusedCheckpoint, match="activation" if key == "hidden_act" else key):
        read_backbone(tmp_path)


def test_pickles_are_refused_by_name(tmp_path):
    tiny_backbone("bert", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(RefusedCheckpoint, match=r"pytorch_model\.bin and pickles are never opened"):
        read_backbone(tmp_path)


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "error", "text"),
    [
        (lambda t: t.pop("embeddings.LayerNorm.bias"), CorruptFile, r"lacks the weight embeddings\.LayerNorm\.bias"),
        (lambda t: t.update({"embeddings.LayerNorm.bias": torch.zeros(31)}), CorruptFile, r"shape \(31,\)"),
        (lambda t: t["embeddings.LayerNorm.bias"].fill_(float("nan")), CorruptFile, "NaN"),
        (lambda t: t.update({"embeddings.LayerNorm.bias": torch.zeros(32).int()}), CorruptFile, "int32"),
        (lambda t: t.update({"encoder.layer.0.x.weight": torch.zeros(1)}), RefusedCheckpoint, r"encoder\.layer\.0\.x"),
    ],
)
def test_bad_weights_name_the_tensor(tmp_path, edit, error, text):
    change(tiny_backbone("bert", tmp_path), edit)
    with pytest.raises(error, match=text):
        read_backbone(tmp_path)


def test_truncated_file(tmp_path):
    path = tiny_backbone("bert", tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptFile, match="cannot be read"):
        read_backbone(tmp_path)
    with pytest.raises(RefusedCheckpoint, match=r"model\.safetensors has no config\.json; give a folder"):
        read_backbone(path)
    path.unlink()
    with pytest.raises(RefusedCheckpoint, match=r"no model\.safetensors"):
        read_backbone(tmp_path)


def sentence_transformer(folder, pooling, dense=None):
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling")] + ([("Dense", "2_Dense")] if dense is not None else [])
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if dense is not None:
        (folder / "2_Dense").mkdir()
        activation = {"activation_function": "torch.nn.modules.activation.Tanh"}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(activation))
        save_file(
            {"linear.weight": dense, "linear.bias": torch.ones(len(dense))}, folder / "2_Dense" / "model.safetensors"
        )
    return folder


def test_pooling_and_projection_as_the_folder_says(folders, tmp_path):
    backbone = read_backbone(folders["bert"])
    hidden = dense_hidden(backbone, None, [4, 5, 6], [0, 0, 0])
    mean = dense_forward(backbone, None, [4, 5, 6], [0, 0, 0])
    assert torch.allclose(mean, hidden.mean(0) / hidden.mean(0).norm())
    dense = torch.randn(7, 32)
    folder = sentence_transformer(tiny_backbone("bert", tmp_path), {"pooling_mode_cls_token": True}, dense)
    projected = torch.tanh(dense @ hidden[0] + 1)
    expected = projected / projected.norm()
    assert torch.allclose(dense_forward(read_backbone(folder), None, [4, 5, 6], [0, 0, 0]), expected, atol=1e-5)


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode_mean_tokens": False},
        {"pooling_mode": "lasttoken"},
    ],
)
def test_other_poolings_are_refused(tmp_path, pooling):
    with pytest.raises(RefusedCheckpoint, match="pooling"):
        read_backbone(sentence_transformer(tiny_backbone("bert", tmp_path), pooling))


def write_module(folder, name, config, **tensors):
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "config.json").write_text(json.dumps(config))
    if tensors:
        save_file({f"linear.{part}": tensor for part, tensor in tensors.items()}, folder / name / "model.safetensors")


MEAN = {"pooling_mode_mean_tokens": True}
TANH = {"activation_function": "torch.nn.modules.activation.Tanh", "bias": True}
WEIGHTS = {"weight": torch.ones(7, 32), "bias": torch.ones(7)}


@pytest.mark.parametrize(
    "kinds",
    [
        ["Transformer", "Pooling", "Normalize", "Dense"],
        ["Transformer", "Dense", "Pooling"],
        ["Transformer", "Pooling", "Pooling"],
        ["Transformer", "Pooling", "LayerNorm"],
        ["Router", "Pooling"],
    ],
    ids=" ".join,
)
def test_sentence_modules_of_another_kind_or_order_are_refused(tmp_path, kinds):
    tiny_backbone("bert", tmp_path)
    write_module(tmp_path, "Pooling", MEAN)
    write_module(tmp_path, "Dense", TANH, **WEIGHTS)
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in kinds]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(RefusedCheckpoint, match=f"modules {' '.join(kinds)} "):
        read_backbone(tmp_path)


@pytest.mark.parametrize(
    ("config", "tensors", "error", "text"),
    [
        (TANH, {"weight": torch.ones(7, 33), "bias": torch.ones(7)}, CorruptFile, r"weight \(7, 33\).*takes 32"),
        (TANH, {"weight": torch.ones(7, 32)}, CorruptFile, "no bias"),
        (TANH | {"bias": False}, WEIGHTS, CorruptFile, "a bias"),
        (TANH | {"activation_function": "torch.nn.SiLU"}, WEIGHTS, RefusedCheckpoint, "activation_function SiLU"),
        (TANH | {"module_input_name": "token_embeddings"}, WEIGHTS, RefusedCheckpoint, "module_input_name"),
    ],
)
def test_projections_that_cannot_be_honoured(tmp_path, config, tensors, error, text):
    sentence_transformer(tiny_backbone("bert", tmp_path), MEAN, torch.ones(7, 32))
    write_module(tmp_path, "2_Dense", config, **tensors)
    with pytest.raises(error, match=text):
        read_backbone(tmp_path)


@pytest.mark.parametrize(
    ("name", "config", "key"),
    [
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
            "default_prompt_name 'query'",
        ),
    ],
)
def test_what_changes_the_text_is_refused(tmp_path, name, config, key):
    tiny_backbone("bert", tmp_path)
    (tmp_path / name).write_text(json.dumps(dict.fromkeys(config)))
    read_backbone(tmp_path)
    (tmp_path / name).write_text(json.dumps(config))
    with pytest.raises(RefusedCheckpoint, match=key):
        read_backbone(tmp_path)
