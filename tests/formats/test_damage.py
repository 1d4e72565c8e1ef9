"""Whatever stands in a config or a tensor, a reader answers with a tenant or with one of our errors."""

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats import test_peft_folder as peft_folder
from tests.formats import test_transformers_head as whole
from vbert.errors import CorruptFile, VbertError
from vbert.formats import inspect, read_tenant

GARBAGE = (None, True, -1, 1e9, "(", ["(", 2], {"a": "b"})


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("damage")
    peft_folder.save(tiny["bert"], root / "peft", peft_folder.lora("bert", bias="all", r=2))
    whole.save(tiny["bert"], root / "transformers", "SequenceClassification", num_labels=3)
    with contextlib.suppress(ImportError):
        import adapters  # noqa: F401  the next line would skip the whole file where there is none

        from tests.formats import test_adapterhub_folder as adapterhub

        adapterhub.save(tiny["bert"], root / "adapters", adapterhub.CONFIGS["houlsby"]())
    return root


@pytest.mark.parametrize(
    ("format_name", "name", "inside"),
    [
        ("peft", "adapter_config.json", None),
        ("adapters", "adapter_config.json", None),
        ("adapters", "adapter_config.json", "config"),
        ("adapters", "head_config.json", "config"),
        ("transformers", "config.json", None),
    ],
)
@pytest.mark.slow
def test_garbage_in_a_config(tiny, folders, format_name, name, inside):
    path = folders / format_name / name
    if not path.exists():
        pytest.skip("adapters is not installed")
    before = path.read_text()
    keys = json.loads(before)[inside] if inside else json.loads(before)
    try:
        for key in keys:
            for value in GARBAGE:
                config = json.loads(before)
                (config[inside] if inside else config)[key] = value
                path.write_text(json.dumps(config))
                with contextlib.suppress(VbertError):
                    read_tenant(path.parent, tiny["bert"].backbone)
        for value in GARBAGE:
            path.write_text(json.dumps(value))
            with pytest.raises(VbertError):
                read_tenant(path.parent, tiny["bert"].backbone)
            assert inspect(path.parent, tiny["bert"].backbone)["refused"]
    finally:
        path.write_text(before)


@pytest.mark.parametrize(("format_name", "name"), [("peft", "adapter_model"), ("transformers", "model")])
@pytest.mark.slow
def test_wrong_shapes_and_missing_tensors(tiny, folders, format_name, name):
    path = folders / format_name / f"{name}.safetensors"
    tensors = load_file(path)
    head = [key for key in tensors if "classifier" in key or "pooler" in key or "layer.1" in key]
    try:
        for key in head:
            for bad in (torch.zeros(()), torch.zeros(3), torch.zeros(2, 7), torch.zeros(0, 32), None):
                changed = {k: t for k, t in tensors.items() if k != key} | ({} if bad is None else {key: bad})
                save_file(changed, path)
                try:
                    module = read_tenant(path.parent, tiny["bert"].backbone)
                except VbertError:
                    continue
                tiny["bert"].outputs(module)  # whatever is accepted can be computed
    finally:
        save_file(tensors, path, metadata={"format": "pt"})


def test_the_message_says_what_and_where(tiny, folders):
    path = folders / "peft" / "adapter_config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | {"lora_alpha": "many"}))
        with pytest.raises(CorruptFile, match=r"peft holds a value that cannot be used \(TypeError"):
            read_tenant(path.parent, tiny["bert"].backbone)
    finally:
        path.write_text(before)
