"""A checkpoint folder of the ecosystem, added to a running engine and answered as its own library answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.serving.helpers import Dense, softmax
from tests.tiny import TEXTS
from vbert.errors import RefusedCheckpoint
from vbert.header import read_header

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' own remarks


@pytest.fixture
def lora(backbone, tmp_path):
    """A PEFT model with random weights, and the folder it was saved to."""
    peft = pytest.importorskip("peft")
    import transformers

    base = transformers.AutoModelForSequenceClassification.from_pretrained(backbone.folder, num_labels=3)
    model = peft.get_peft_model(
        base, peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    ).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "classifier" in name:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path / "lora")
    return model, tmp_path / "lora"


async def test_a_peft_folder_is_served_as_peft_computes_it(serving, backbone, lora):
    model, folder = lora
    encoded = Dense(backbone).tokenizer.encode(TEXTS)
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([e.token_ids])).logits[0].numpy() for e in encoded]
    async with serving() as engine:
        version = await engine.add_tenant("imported", folder)
        answer = await engine.classify("imported", TEXTS)
        header = read_header(engine._core.parts.store.blob_path(version.digest))
    np.testing.assert_allclose(answer.probabilities, softmax(np.stack(logits)), rtol=0, atol=1e-4)
    assert version.source["format"] == "peft"
    assert header.num_self_tests > 0  # peft's own answers travel with the tenant


async def test_what_cannot_be_honoured_is_refused_and_leaves_nothing(serving, lora):
    _, folder = lora
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"LORA"', '"POLY"'))
    async with serving() as engine:
        with pytest.raises(RefusedCheckpoint, match="POLY"):
            await engine.add_tenant("imported", folder)
        assert await engine.list_tenants() == []
