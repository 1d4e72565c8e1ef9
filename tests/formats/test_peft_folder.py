"""PEFT folders as read equal PEFT's own output; what cannot be honoured is refused by its name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.conftest import Tiny, assert_equal_original, randomise_trained_
from vbert.config import MODEL_TYPES
from vbert.errors import CorruptFile, RefusedCheckpoint
from vbert.formats import read_tenant
from vbert.tenant import Affine, LowRank, Norm

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own remarks on odd adapters and old options
ATTENTION = {"distilbert": ["q_lin", "v_lin"], "mpnet": ["attn.q", "attn.v"]}
DENSE = {"distilbert": ["out_lin", "lin1", "lin2", "k_lin"], "mpnet": ["attn.o", "dense", "attn.k"]}
EVERY = {kind: ATTENTION[kind] + DENSE[kind] for kind in ATTENTION}
FEED_FORWARD = {"distilbert": ["lin2"]}


def attention(model_type):
    return ATTENTION.get(model_type, ["query", "value"])


def every(model_type):
    return EVERY.get(model_type, ["query", "key", "value", "dense"])


def save(tiny, folder, config, task="SEQ_CLS", num_labels=3, **options):
    """Make, randomise and save an adapter of `config` on the tiny backbone."""
    import transformers

    auto = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "FEATURE_EXTRACTION": transformers.AutoModel,
    }[task]
    labels = {} if task == "FEATURE_EXTRACTION" else {"num_labels": num_labels}
    model = peft.get_peft_model(auto.from_pretrained(tiny.folder, **labels, **options), config).eval()
    randomise_trained_(model)
    model.save_pretrained(folder)
    return model


def lora(model_type, **options):
    options = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 12, "target_modules": attention(model_type)} | options
    return peft.LoraConfig(**options)


CASES = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 3},
    "dora": {"use_dora": True},
    "bias-all": {"bias": "all"},
    "bias-lora-only": {"bias": "lora_only"},
    "lora-bias": {"lora_bias": True},
    "dora-bias-all": {"use_dora": True, "bias": "all"},
    "regex": {"target_modules": r".*layer\.1\..*(query|q_lin|\.q)"},
    "all-linear": {"target_modules": "all-linear"},
    "layers": {"layers_to_transform": [1]},
    "layers-pattern": {"layers_to_transform": 0, "layers_pattern": "layer"},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize(
    ("case", "model_type"),
    [(case, "bert") for case in CASES]
    + [(case, kind) for kind in MODEL_TYPES[1:] for case in ("lora", "dora-bias-all", "regex", "layers")],
)
def test_lora_equals_peft(tiny, tmp_path, case, model_type):
    save(tiny[model_type], tmp_path, lora(model_type, **CASES[case]))
    assert_equal_original(tiny[model_type], tmp_path)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("use_dora", [False, True])
def test_every_linear_and_the_pooler(tiny, tmp_path, model_type, use_dora):
    save(tiny[model_type], tmp_path, lora(model_type, target_modules=every(model_type), use_dora=use_dora, bias="all"))
    module = assert_equal_original(tiny[model_type], tmp_path)
    assert {d.site for d in module.deltas if isinstance(d, LowRank)} == {
        "q",
        "k",
        "v",
        "attn_out",
        "ffn_up",
        "ffn_down",
    }
    assert {d.layer for d in module.deltas if isinstance(d, Norm)} == {-1, 0, 1}
    assert not module.head.shared_pooler


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_rank_and_alpha_patterns(tiny, tmp_path, model_type):
    first = attention(model_type)[0]
    patterns = {"rank_pattern": {rf"layer\.1\..*{first}": 2, first: 6}, "alpha_pattern": {attention(model_type)[1]: 5}}
    save(tiny[model_type], tmp_path, lora(model_type, **patterns))
    module = assert_equal_original(tiny[model_type], tmp_path)
    assert {(d.layer, d.site): d.a.shape[1] for d in module.deltas} == {
        (0, "q"): 6,
        (1, "q"): 2,
        (0, "v"): 4,
        (1, "v"): 4,
    }


@pytest.mark.parametrize("exclude", [["value"], r".*layer\.0\..*"])
def test_exclude_modules(tiny, tmp_path, exclude):
    save(tiny["bert"], tmp_path, lora("bert", exclude_modules=exclude))
    assert len(assert_equal_original(tiny["bert"], tmp_path).deltas) == 2


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("task", ["TOKEN_CLS", "FEATURE_EXTRACTION"])
def test_other_tasks(tiny, tmp_path, model_type, task):
    config = lora(model_type, task_type=task, target_modules=every(model_type))
    save(tiny[model_type], tmp_path, config, task=task)
    module = assert_equal_original(tiny[model_type], tmp_path)
    assert module.head.kind == ("embed" if task == "FEATURE_EXTRACTION" else "token_classify")


def test_an_adapter_without_task_or_head_embeds(tiny, tmp_path):
    save(tiny["bert"], tmp_path, lora("bert", task_type=None), task="FEATURE_EXTRACTION")
    module = assert_equal_original(tiny["bert"], tmp_path)
    assert module.head == tiny["bert"].backbone.embed_head


def test_an_adapter_trained_inside_a_classifier_without_its_head_embeds(tiny, tmp_path):
    save(tiny["bert"], tmp_path, lora("bert", task_type=None))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"auto_mapping": None}))
    assert assert_equal_original(tiny["bert"], tmp_path).head.kind == "embed"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_task_from_the_model_class(tiny, tmp_path, model_type, task):
    saved = ["classifier", "pooler", "LayerNorm", "layer_norm"]
    save(tiny[model_type], tmp_path, lora(model_type, task_type=None, modules_to_save=saved), task=task)
    module = assert_equal_original(tiny[model_type], tmp_path)
    assert module.head.kind == {"SEQ_CLS": "classify", "TOKEN_CLS": "token_classify"}[task]
    assert len([d for d in module.deltas if isinstance(d, Norm)]) == 5


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_ia3_equals_peft(tiny, tmp_path, model_type):
    outputs = {"distilbert": ["k_lin", "v_lin", "lin1"], "mpnet": ["attn.k", "attn.v"]}
    outputs = outputs.get(model_type, ["key", "value", "intermediate.dense"])
    inputs = ["lin2", "out_lin"] if model_type == "distilbert" else ["output.dense", "attn.o"]
    config = peft.IA3Config(task_type="SEQ_CLS", target_modules=outputs + inputs, feedforward_modules=inputs)
    save(tiny[model_type], tmp_path, config)
    module = assert_equal_original(tiny[model_type], tmp_path)
    assert all(isinstance(delta, Affine) for delta in module.deltas)
    assert any(delta.input_scale is not None for delta in module.deltas)


def test_ia3_on_the_pooler_is_merged(tiny, tmp_path):
    config = peft.IA3Config(
        task_type="SEQ_CLS", target_modules=["pooler.dense", "key"], feedforward_modules=["pooler.dense"]
    )
    save(tiny["bert"], tmp_path, config)
    assert len(assert_equal_original(tiny["bert"], tmp_path).head.layers) == 2


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_vera_and_adalora_equal_peft(tiny, tmp_path, model_type):
    common = {"task_type": "TOKEN_CLS", "target_modules": every(model_type)}
    save(tiny[model_type], tmp_path / "vera", peft.VeraConfig(r=8, bias="vera_only", **common), task="TOKEN_CLS")
    assert_equal_original(tiny[model_type], tmp_path / "vera")
    config = peft.AdaLoraConfig(init_r=6, total_step=10, **common)
    save(tiny[model_type], tmp_path / "adalora", config, task="TOKEN_CLS")
    assert_equal_original(tiny[model_type], tmp_path / "adalora")


def test_adalora_with_pruned_ranks(tiny, tmp_path):
    config = peft.AdaLoraConfig(init_r=4, total_step=10, task_type="TOKEN_CLS", target_modules=["query"])
    name = "bert.encoder.layer.{}.attention.self.query.lora_E"
    config.rank_pattern = {name.format(0): [True, False, True, False], name.format(1): [False] * 4}
    save(tiny["bert"], tmp_path, config, task="TOKEN_CLS")
    assert [d.a.shape[1] for d in assert_equal_original(tiny["bert"], tmp_path).deltas] == [2]


def test_labels_and_problem_from_the_config_beside_it(tiny, tmp_path):
    model = save(tiny["bert"], tmp_path, lora("bert"), id2label={0: "bad", 1: "so-so", 2: "good"})
    assert read_tenant(tmp_path, tiny["bert"].backbone).head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    model.config.problem_type = "multi_label_classification"
    model.config.save_pretrained(tmp_path)
    head = assert_equal_original(tiny["bert"], tmp_path).head
    assert head.labels == ("bad", "so-so", "good")
    assert head.problem == "multi_label"


def test_one_label_is_regression_or_a_reranker(tiny, tmp_path):
    model = save(tiny["bert"], tmp_path, lora("bert"), num_labels=1)
    assert assert_equal_original(tiny["bert"], tmp_path).head.problem == "regression"
    head = assert_equal_original(tiny["bert"], tmp_path, task="rerank").head
    assert (head.kind, head.problem) == ("rerank", "single_label")
    model.config.problem_type = "regression"
    model.config.save_pretrained(tmp_path)
    assert read_tenant(tmp_path, tiny["bert"].backbone, task="rerank").head.problem == "regression"
    with pytest.raises(RefusedCheckpoint, match="SEQ_CLS, not for embed"):
        read_tenant(tmp_path, tiny["bert"].backbone, task="embed")


def test_weights_in_half_precision_are_read_as_fp32(tiny, tmp_path):
    save(tiny["bert"], tmp_path, lora("bert"))
    change(tmp_path, lambda t: {key: tensor.half() for key, tensor in t.items()})
    module = read_tenant(tmp_path, tiny["bert"].backbone)
    assert {d.a.dtype for d in module.deltas} == {torch.float32}


def change(folder, edit):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(edit(tensors) or tensors, folder / "adapter_model.safetensors")


def configure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save(tiny["bert"], folder, lora("bert"))
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}


@pytest.fixture
def adapter(saved, tmp_path):
    for name, data in saved.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "PROMPT_TUNING"),
        ("peft_type", "PREFIX_TUNING"),
        ("peft_type", "P_TUNING"),
        ("peft_type", "LOHA"),
        ("peft_type", "OFT"),
        ("task_type", "CAUSAL_LM"),
        ("task_type", "QUESTION_ANS"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "mica"),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("target_parameters", ["weight"]),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("arrow_config", {"top_k": 1}),
        ("megatron_config", {"a": 1}),
        ("an_option_of_tomorrow", 3),
        ("target_modules", None),
        ("target_modules", "(query"),
        ("r", 0),
    ],
)
def test_refused_by_name(tiny, adapter, key, value):
    configure(adapter, **{key: value})
    with pytest.raises(RefusedCheckpoint, match=key) as caught:
        read_tenant(adapter, tiny["bert"].backbone)
    assert key == "target_modules" or str(value).split("_niter")[0] in caught.value.message


QUERY = "base_model.model.bert.encoder.layer.{}.attention.self.query.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "error", "text"),
    [
        (lambda t: t.pop(QUERY.format(0)) is None, CorruptFile, r"promises lora_A of .*layer\.0.*query"),
        (lambda t: t.update({QUERY.format(0): torch.zeros(5, 32)}), CorruptFile, r"\(5, 32\).*\(4, 32\)"),
        (lambda t: t[QUERY.format(0)].fill_(float("nan")) is None, CorruptFile, "NaN"),
        (lambda t: t.update({QUERY.format(7): torch.zeros(4, 32)}), RefusedCheckpoint, "2 layers"),
        (lambda t: t.update({"base_model.model.score.weight": torch.zeros(3, 32)}), RefusedCheckpoint, "score"),
        (lambda t: t.update({QUERY.format(0).replace("bert.", ""): torch.zeros(4, 32)}), CorruptFile, "twice"),
        (lambda t: t.pop("base_model.model.classifier.weight") is None, CorruptFile, r"promises classifier\.weight"),
        (
            lambda t: t.update({"base_model.model.bert.embeddings.word_embeddings.lora_embedding_A": torch.zeros(1)}),
            RefusedCheckpoint,
            "share the embeddings",
        ),
        (
            lambda t: t.update({QUERY.format(0).replace("query.lora_A", "key"): torch.zeros(32, 32)}),
            RefusedCheckpoint,
            "whole weight matrix",
        ),
    ],
)
def test_bad_files_name_the_tensor(tiny, adapter, edit, error, text):
    change(adapter, lambda t: edit(t) and None)
    with pytest.raises(error, match=text):
        read_tenant(adapter, tiny["bert"].backbone)


def test_pickles_and_truncated_files(tiny, adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptFile, match="cannot be read"):
        read_tenant(adapter, tiny["bert"].backbone)
    path.rename(adapter / "adapter_model.bin")
    with pytest.raises(RefusedCheckpoint, match=r"adapter_model\.bin and pickles are never opened"):
        read_tenant(adapter, tiny["bert"].backbone)


def test_missing_pooler_and_pre_classifier_are_named(tiny, tmp_path, adapter):
    from tests.tiny import tiny_backbone
    from vbert.formats import read_backbone

    bare = read_backbone(tiny_backbone("bert", tmp_path / "bare", pooler=False))
    with pytest.raises(RefusedCheckpoint, match=r"pooler\.dense"):
        read_tenant(adapter, bare)
    save(tiny["distilbert"], tmp_path / "d", lora("distilbert"))
    change(tmp_path / "d", lambda t: t.pop("base_model.model.pre_classifier.weight") is None and None)
    with pytest.raises(CorruptFile, match="promises pre_classifier"):
        read_tenant(tmp_path / "d", tiny["distilbert"].backbone)


def test_a_frozen_head_comes_from_the_backbones_folder(tiny, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from vbert.formats import read_backbone

    folder = tmp_path / "tuned"
    AutoModelForSequenceClassification.from_pretrained(tiny["distilbert"].folder, num_labels=3).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny["distilbert"].folder / name).read_bytes())
    tuned = Tiny(folder, read_backbone(folder), tiny["distilbert"].inputs)
    save(tuned, tmp_path / "a", peft.LoraConfig(target_modules=["q_lin", "pre_classifier"]))
    assert_equal_original(tuned, tmp_path / "a")


def test_ia3_before_q_k_v_is_refused(tiny, tmp_path):
    config = peft.IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=["key"])
    save(tiny["bert"], tmp_path, config)
    with pytest.raises(RefusedCheckpoint, match="scales the input of k"):
        read_tenant(tmp_path, tiny["bert"].backbone)


def test_vera_without_projections_is_refused(tiny, tmp_path):
    config = peft.VeraConfig(task_type="SEQ_CLS", target_modules=["query"], r=4, save_projection=False)
    save(tiny["bert"], tmp_path, config)
    with pytest.raises(RefusedCheckpoint, match="save_projection"):
        read_tenant(tmp_path, tiny["bert"].backbone)


def test_an_open_task_is_asked_for(tiny, tmp_path):
    save(tiny["bert"], tmp_path, lora("bert", task_type=None, modules_to_save=["classifier"]))
    configure(tmp_path, auto_mapping=None)
    with pytest.raises(RefusedCheckpoint, match="SEQ_CLS and TOKEN_CLS"):
        read_tenant(tmp_path, tiny["bert"].backbone)
    assert_equal_original(tiny["bert"], tmp_path, task="classify")
