"""AdapterHub folders as read equal `adapters`' own output; what cannot be honoured is refused by its name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.conftest import assert_equal_original
from vbert.errors import CorruptFile, RefusedCheckpoint
from vbert.formats import read_tenant
from vbert.tenant import Bottleneck, LowRank

adapters = pytest.importorskip("adapters")
NATIVE = ("bert", "roberta", "xlm-roberta", "distilbert")


def mpnet_interface():
    return adapters.AdapterModelInterface(
        adapter_methods=["bottleneck", "lora"],
        model_embeddings="embeddings",
        model_layers="encoder.layer",
        layer_self_attn="attention",
        layer_cross_attn=None,
        attn_o_proj="attn.o",
        attn_k_proj="attn.k",
        attn_q_proj="attn.q",
        attn_v_proj="attn.v",
        layer_intermediate_proj="intermediate.dense",
        layer_output_proj="output.dense",
        layer_pre_self_attn="attention",
        layer_pre_ffn="intermediate",
        layer_ln_1="attention.LayerNorm",
        layer_ln_2="output.LayerNorm",
    )


def randomise_adapter_(model):
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".t." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


def save(tiny, folder, config, head="flex", **options):
    """Make, randomise and save an adapter "t": with a flexible head, a transformers class's head, or bare."""
    import transformers

    interface = mpnet_interface() if tiny.backbone.config.model_type == "mpnet" else None
    if head == "flex":
        model = adapters.AutoAdapterModel.from_pretrained(tiny.folder)
        model.add_adapter("t", config=config)
        kind = options.pop("kind", "classification")
        getattr(model, f"add_{kind}_head")("t", **({"num_labels": 3} | options))
    else:
        auto = getattr(transformers, {"bare": "AutoModel"}.get(head, f"AutoModelFor{head}"))
        labels = {} if head == "bare" else {"num_labels": 3}
        model = auto.from_pretrained(tiny.folder, **labels)
        adapters.init(model, interface=interface)
        model.add_adapter("t", config=config)
    model.set_active_adapters("t")
    randomise_adapter_(model)
    model.save_adapter(str(folder), "t", use_safetensors=True)
    return model


CONFIGS = {
    "houlsby": lambda: adapters.DoubleSeqBnConfig(reduction_factor=8),
    "pfeiffer": lambda: adapters.SeqBnConfig(reduction_factor=4),
    "parallel": lambda: adapters.ParBnConfig(reduction_factor=4),
    "parallel-attention": lambda: adapters.ParBnConfig(mh_adapter=True, reduction_factor=16, scaling=0.5),
    "pfeiffer-attention": lambda: adapters.SeqBnConfig(mh_adapter=True, non_linearity="gelu"),
    "after": lambda: adapters.SeqBnConfig(original_ln_after=False, residual_before_ln=False, mh_adapter=True),
    "houlsby-residual": lambda: adapters.DoubleSeqBnConfig(residual_before_ln=False, non_linearity="tanh"),
    "reductions": lambda: adapters.DoubleSeqBnConfig(reduction_factor={"1": 4, "default": 16}),
    "leave-out": lambda: adapters.DoubleSeqBnConfig(leave_out=[0]),
    "learned-scale": lambda: adapters.ParBnConfig(scaling="learned"),
    "channel-scale": lambda: adapters.DoubleSeqBnConfig(scaling="channel"),
    "wide": lambda: adapters.SeqBnConfig(reduction_factor=0.5),
    "rank-one": lambda: adapters.SeqBnConfig(reduction_factor=64),
    "lora": lambda: adapters.LoRAConfig(r=4, alpha=6, attn_matrices=["q", "k", "v"], intermediate_lora=True),
    "lora-output": lambda: adapters.LoRAConfig(r=2, selfattn_lora=False, output_lora=True, leave_out=[1]),
    "ia3": lambda: adapters.IA3Config(),
}


@pytest.mark.parametrize(
    ("case", "model_type"),
    [(case, "bert") for case in CONFIGS]
    + [(case, kind) for kind in NATIVE[1:] for case in ("houlsby", "pfeiffer", "parallel", "after", "lora", "ia3")],
)
def test_adapters_equal_the_library(tiny, tmp_path, case, model_type):
    save(tiny[model_type], tmp_path, CONFIGS[case]())
    module = assert_equal_original(tiny[model_type], tmp_path)
    kinds = {type(delta) for delta in module.deltas}
    assert Bottleneck in kinds or "lora" in case or case == "ia3"
    if case == "leave-out":
        assert {delta.layer for delta in module.deltas} == {1}


@pytest.mark.parametrize("case", ["houlsby", "houlsby-residual", "parallel", "parallel-attention", "lora"])
def test_mpnet_through_an_interface(tiny, tmp_path, case):
    save(tiny["mpnet"], tmp_path, CONFIGS[case](), head="SequenceClassification")
    assert_equal_original(tiny["mpnet"], tmp_path)


def test_an_interface_that_takes_the_wrong_layer_norm_is_refused(tiny, tmp_path):
    save(tiny["mpnet"], tmp_path, CONFIGS["pfeiffer"](), head="SequenceClassification")
    with pytest.raises(RefusedCheckpoint, match="original_ln_before true through an AdapterModelInterface"):
        read_tenant(tmp_path, tiny["mpnet"].backbone)


@pytest.mark.parametrize("model_type", NATIVE)
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "bare"])
def test_heads_of_transformers_classes(tiny, tmp_path, model_type, head):
    save(tiny[model_type], tmp_path, CONFIGS["houlsby"](), head=head)
    module = assert_equal_original(tiny[model_type], tmp_path)
    assert module.head.kind == {"SequenceClassification": "classify", "TokenClassification": "token_classify"}.get(
        head, "embed"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"id2label": {0: "a", 1: "b", 2: "c"}},
        {"layers": 1},
        {"layers": 3, "activation_function": "relu"},
        {"layers": 2, "activation_function": None},
        {"use_pooler": True},
        {"multilabel": True},
        {"num_labels": 1},
        {"kind": "tagging"},
        {"kind": "tagging", "layers": 2},
    ],
    ids=str,
)
def test_flexible_heads(tiny, tmp_path, options):
    save(tiny["bert"], tmp_path, CONFIGS["pfeiffer"](), **options)
    head = assert_equal_original(tiny["bert"], tmp_path).head
    assert head.kind == ("token_classify" if options.get("kind") == "tagging" else "classify")
    expected = "multi_label" if options.get("multilabel") else "regression" if options.get("num_labels") == 1 else None
    assert head.problem == (expected or "single_label")
    assert head.shared_pooler == options.get("use_pooler", False)
    assert head.labels == (
        ("a", "b", "c") if "id2label" in options else tuple(f"LABEL_{i}" for i in range(len(head.labels)))
    )


def test_one_label_reranks(tiny, tmp_path):
    save(tiny["bert"], tmp_path, CONFIGS["pfeiffer"](), num_labels=1)
    assert assert_equal_original(tiny["bert"], tmp_path, task="rerank").head.kind == "rerank"


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save(tiny["bert"], folder, CONFIGS["houlsby"]())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def adapter(saved, tmp_path):
    for name, data in saved.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def configure(folder, name, **changes):
    stated = json.loads((folder / name).read_text())
    stated["config"] |= changes
    (folder / name).write_text(json.dumps(stated))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ln_before", True),
        ("ln_after", True),
        ("use_gating", True),
        ("inv_adapter", "nice"),
        ("phm_layer", True),
        ("architecture", "prefix_tuning"),
        ("architecture", "prompt_tuning"),
        ("architecture", "reft"),
        ("architecture", "union"),
        ("non_linearity", "leakyrelu"),
        ("residual_before_ln", "post_add"),
        ("original_ln_after", False),
        ("vera_d", 0.0),
        ("use_dora", True),
        ("an_option_of_tomorrow", 0),
    ],
)
def test_refused_by_name(tiny, adapter, key, value):
    configure(adapter, "adapter_config.json", **{key: value})
    with pytest.raises(RefusedCheckpoint, match=key):
        read_tenant(adapter, tiny["bert"].backbone)


@pytest.mark.parametrize(
    ("key", "value"), [("head_type", "question_answering"), ("head_type", "causal_lm"), ("activation_function", "mish")]
)
def test_heads_refused_by_name(tiny, adapter, key, value):
    configure(adapter, "head_config.json", **{key: value})
    with pytest.raises(RefusedCheckpoint, match=key):
        read_tenant(adapter, tiny["bert"].backbone)


def test_another_model_type_is_refused(tiny, adapter):
    with pytest.raises(RefusedCheckpoint, match="made for bert of width 32"):
        read_tenant(adapter, tiny["roberta"].backbone)


UP = "bert.encoder.layer.1.output.adapters.t.adapter_up.weight"


@pytest.mark.parametrize(
    ("edit", "error", "text"),
    [
        (lambda t: t.pop(UP), CorruptFile, r"promises adapter_up\.weight of encoder\.layer\.1\.output"),
        (lambda t: t.update({UP: torch.zeros(32, 5)}), CorruptFile, r"\(32, 5\).*\(32, 4\)"),
        (lambda t: t.update({UP.replace("1", "7"): torch.zeros(32, 4)}), RefusedCheckpoint, r"layer\.7"),
        (
            lambda t: t.update({"bert.invertible_adapters.t.F.0.weight": torch.zeros(1)}),
            RefusedCheckpoint,
            "invertible",
        ),
        (lambda t: t[UP].fill_(float("inf")), CorruptFile, "infinite"),
    ],
)
def test_bad_files_name_the_tensor(tiny, adapter, edit, error, text):
    tensors = load_file(adapter / "adapter.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter.safetensors")
    with pytest.raises(error, match=text):
        read_tenant(adapter, tiny["bert"].backbone)


def test_pickles_are_refused_by_name(tiny, adapter):
    (adapter / "model_head.safetensors").rename(adapter / "pytorch_model_head.bin")
    with pytest.raises(RefusedCheckpoint, match=r"pytorch_model_head\.bin and pickles.*use_safetensors=True"):
        read_tenant(adapter, tiny["bert"].backbone)


def test_old_lora_is_scaled_as_the_library_loads_it(tiny, tmp_path):
    save(tiny["bert"], tmp_path, CONFIGS["lora"]())
    stated = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(stated | {"version": "adapters.1.0.1"}))
    module = assert_equal_original(tiny["bert"], tmp_path)
    assert {type(delta) for delta in module.deltas} == {LowRank}
