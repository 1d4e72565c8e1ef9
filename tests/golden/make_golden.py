"""Make the golden files: tiny checkpoints of every reader with the outputs of the libraries that wrote them.

    python -m tests.golden.make_golden         # rewrites tests/golden/data; needs peft and adapters

Recorded with transformers 4.57.6, peft 0.21.2 and adapters 1.3.0. Where adapters is not installed (it does not work
with transformers 5) test_golden.py still holds the readers to these numbers. Weights are stored in half precision,
which every reader and library widens to the same fp32 numbers.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import adapters
import peft
import torch
from safetensors.torch import load_file, save_file

from tests.formats.conftest import Tiny
from tests.formats.test_adapterhub_folder import save as save_adapter
from tests.formats.test_peft_folder import every, lora
from tests.formats.test_peft_folder import save as save_peft
from tests.tiny import randomise_, tiny_config
from vbert.formats import read_backbone, read_tenant
from vbert.formats.original import original_outputs
from vbert.tokenizer import Encoded

DATA = Path(__file__).parent / "data"
SIZES = {"hidden": 16, "heads": 2, "ffn": 32, "vocab_size": 64, "positions": 34}
IA3 = {"bert": (["key", "value"], ["output.dense"]), "distilbert": (["k_lin", "v_lin"], ["lin2"])}


def peft_cases(model_type):
    """name -> (task type, config)"""
    patterns = {"rank_pattern": {r"layer\.1\..*query": 2}, "alpha_pattern": {"value": 5}, "use_rslora": True}
    outputs, inputs = IA3.get(model_type, IA3["bert"])
    ia3 = peft.IA3Config(task_type="SEQ_CLS", target_modules=outputs + inputs, feedforward_modules=inputs)
    tokens = {"task_type": "TOKEN_CLS", "target_modules": every(model_type)}
    return {
        "bert": {
            "lora-patterns": ("SEQ_CLS", lora("bert", **patterns)),
            "lora-embed": ("FEATURE_EXTRACTION", lora("bert", task_type="FEATURE_EXTRACTION", r=2)),
            "dora-bias-all": ("SEQ_CLS", lora("bert", use_dora=True, bias="all", target_modules=every("bert"), r=2)),
            "lora-saved": ("TOKEN_CLS", lora("bert", task_type="TOKEN_CLS", modules_to_save=["LayerNorm"], r=2)),
            "ia3": ("SEQ_CLS", ia3),
            "adalora": ("TOKEN_CLS", peft.AdaLoraConfig(init_r=3, total_step=9, **tokens)),
            "vera": ("TOKEN_CLS", peft.VeraConfig(r=4, **tokens)),
        },
        "roberta": {
            "lora-all-linear": ("SEQ_CLS", lora("roberta", target_modules="all-linear", bias="lora_only", r=2)),
            "dora": ("TOKEN_CLS", lora("roberta", use_dora=True, task_type="TOKEN_CLS", r=2)),
        },
        "xlm-roberta": {"lora-bias": ("SEQ_CLS", lora("xlm-roberta", lora_bias=True, r=2))},
        "distilbert": {
            "lora": ("SEQ_CLS", lora("distilbert", target_modules=every("distilbert"), r=2)),
            "ia3": ("SEQ_CLS", ia3),
        },
        "mpnet": {"lora": ("SEQ_CLS", lora("mpnet", target_modules=every("mpnet"), r=2))},
    }[model_type]


def adapter_cases(model_type):
    """name -> (config, head, options)"""
    houlsby, pfeiffer = adapters.DoubleSeqBnConfig(reduction_factor=8), adapters.SeqBnConfig(reduction_factor=4)
    parallel = adapters.ParBnConfig(reduction_factor=4)
    return {
        "bert": {
            "houlsby": (houlsby, "flex", {"id2label": {0: "a", 1: "b", 2: "c"}}),
            "pfeiffer": (pfeiffer, "flex", {"kind": "tagging"}),
            "parallel": (parallel, "flex", {"use_pooler": True, "multilabel": True}),
            "after": (adapters.SeqBnConfig(original_ln_after=False, residual_before_ln=False), "bare", {}),
        },
        "roberta": {"pfeiffer": (pfeiffer, "SequenceClassification", {})},
        "xlm-roberta": {"parallel": (parallel, "TokenClassification", {})},
        "distilbert": {"houlsby": (houlsby, "SequenceClassification", {})},
        "mpnet": {"houlsby": (houlsby, "TokenClassification", {})},
    }[model_type]


def make(model_type: str) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    torch.manual_seed(len(model_type))
    root = DATA / model_type
    model = AutoModel.from_config(tiny_config(model_type, **SIZES))
    randomise_(model)
    model.save_pretrained(root / "backbone")
    _halve(root / "backbone")
    ids = [torch.randint(5, SIZES["vocab_size"], (n,)) for n in (4, 11, 30)]
    types = [(torch.arange(len(row)) > 6).long() * (model_type == "bert") for row in ids]
    inputs = [
        Encoded(token_ids=i.tolist(), type_ids=t.tolist(), full_length=len(i)) for i, t in zip(ids, types, strict=True)
    ]
    tiny = Tiny(root / "backbone", read_backbone(root / "backbone"), inputs)
    for name, (task, config) in peft_cases(model_type).items():
        save_peft(tiny, root / f"peft-{name}", config, task=task)
    for name, (config, head, options) in adapter_cases(model_type).items():
        save_adapter(tiny, root / f"adapters-{name}", config, head=head, **options)
    if model_type == "bert":
        whole = AutoModelForSequenceClassification.from_pretrained(tiny.folder, num_labels=4)
        whole.save_pretrained(root / "transformers-classifier")
    expected = {f"token_ids.{i}": row for i, row in enumerate(ids)} | {
        f"type_ids.{i}": row for i, row in enumerate(types)
    }
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        _clean(folder, tiny.folder)
        module = read_tenant(folder, tiny.backbone)
        outputs = original_outputs(folder, tiny.backbone, module, inputs)
        expected |= {f"{folder.name}.{i}": output.contiguous() for i, output in enumerate(outputs)}
    save_file(expected, root / "expected.safetensors")


def _clean(folder: Path, backbone: Path) -> None:
    """Half precision, no model card, and no path of the machine that recorded it."""
    (folder / "README.md").unlink(missing_ok=True)
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace(str(backbone), "tiny"))
    _halve(folder)


def _halve(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = {key: tensor.half() for key, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    shutil.rmtree(DATA, ignore_errors=True)
    for model_type in ("bert", "roberta", "xlm-roberta", "distilbert", "mpnet"):
        make(model_type)


if __name__ == "__main__":
    main()
