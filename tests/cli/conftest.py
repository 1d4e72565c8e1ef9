"""Checkpoints of every format on one tiny backbone, and the command as a function."""

import json

import pytest
import torch
from safetensors.torch import save_file

import cli
from tests.random_tenants import Factory
from tests.tiny import tiny_backbone
from vbert.checkpoint import write_tenant
from vbert.formats.transformers_folder import read_backbone


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    return read_backbone(tiny_backbone("bert", tmp_path_factory.mktemp("backbone") / "tiny-bert"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, backbone):
    """A folder with good and bad checkpoints, as `import` finds it."""
    folder, factory = tmp_path_factory.mktemp("checkpoints"), Factory(backbone, seed=1)
    (folder / "intent.safetensors").write_bytes(write_tenant(factory.tenant("lora", head="classify")))
    (folder / "vectors.safetensors").write_bytes(write_tenant(factory.tenant("bitfit", head="embed")))
    (folder / "cut.safetensors").write_bytes((folder / "intent.safetensors").read_bytes()[:-100])
    (folder / "bad name.safetensors").write_bytes((folder / "intent.safetensors").read_bytes())
    (folder / "prefix").mkdir()
    (folder / "prefix" / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING"}))
    (folder / "README.md").write_text("not a checkpoint")
    peft_embedder(folder / "peft")
    return folder


def peft_embedder(folder):
    """What `peft` writes for a LoRA on the query of a bare encoder."""
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["query"], "bias": "none"}))
    tensors = {}
    for layer in range(2):
        path = f"base_model.model.encoder.layer.{layer}.attention.self.query"
        tensors[f"{path}.lora_A.weight"] = torch.full((2, 32), 0.1)
        tensors[f"{path}.lora_B.weight"] = torch.full((32, 2), 0.1 * (layer + 1))
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture
def vbert(capsys, monkeypatch):
    """`vbert("tenants", "list", ...)` gives exit code, stdout and stderr; with --json, stdout read as JSON."""
    for name in ("STORE", "SERVER", "KEY", "BACKBONE"):
        monkeypatch.delenv(f"VBERT_{name}", raising=False)

    def vbert(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:  # --help
            code = exit.code
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in arguments and out else out, err

    return vbert


@pytest.fixture
def ok(vbert):
    """The stdout of a command that succeeds."""

    def ok(*arguments):
        code, out, err = vbert(*arguments)
        assert (code, err) == (0, "")
        return out

    return ok


@pytest.fixture
def refused(vbert):
    """The one line of a command that fails."""

    def refused(*arguments):
        code, out, err = vbert(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("vbert: error: ")
        assert err.count("\n") == 1
        return err.removeprefix("vbert: error: ").strip()

    return refused
