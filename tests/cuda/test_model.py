"""The model on a real device: against the dense reference, `transformers` and `peft`, in every dtype, with graphs too.

The real checkpoint is the folder that VBERT_MODEL names, else one under shared/models, else a random one of that shape.
"""

import os
import random
from pathlib import Path

import pytest
import torch

from benchmarks.workload import write_backbone
from runtime.uploads import moved_at_once
from tests.encoder.test_laws import Bench, all_kinds, assert_close
from tests.random_tenants import Factory
from tests.tiny import tiny_backbone
from tests.tolerances import assert_answer, assert_hidden
from vbert.arena import Arena
from vbert.config import MODEL_TYPES
from vbert.formats import read_tenant
from vbert.formats.original import original_outputs
from vbert.formats.transformers_folder import read_backbone
from vbert.graphs import Signature
from vbert.memory import Slabs
from vbert.model import Model, SequenceInput

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
ROOM = 1 << 30
TOLERANCE = {"float32": 1e-4, "float16": 0.015, "bfloat16": 0.06}  # of the largest number of the answer


class DeviceBench(Bench):
    """A bench whose model, slots and heads are on the GPU."""

    def __init__(self, backbone, dtype, folder, **how):
        super().__init__(backbone, "float32", folder)
        self.model = Model.load(backbone, dtype, DEVICE, **how)
        self.arena._dtype = self.model.dtype
        memory = Slabs(torch.empty(ROOM, dtype=torch.uint8, device=self.model.device))
        self.device_arena = Arena(backbone.config, backbone.fingerprint, self.model.dtype, ROOM, memory=memory)

    def on_device(self, modules):
        """Each tenant loaded into host memory, then moved as the runtime moves it."""
        return [module and moved_at_once(self.load(module), self.device_arena) for module in modules]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_kind_of_tenant_in_one_batch(model_type, dtype, tmp_path):
    backbone = read_backbone(tiny_backbone(model_type, tmp_path / "backbone"))
    bench = DeviceBench(backbone, dtype, tmp_path)
    modules = [*all_kinds(Factory(backbone, seed=3)), None]
    tenants = bench.on_device(modules)
    sequences = [s for tenant in tenants for s in bench.sequences(tenant)]
    where = random.Random(0).sample(range(len(sequences)), len(sequences))
    mixed = dict(zip(where, bench.forward([sequences[i] for i in where]), strict=True))
    for i, module in enumerate(modules):
        count = len(bench.encoded)
        got = [mixed[j] for j in range(i * count, (i + 1) * count)]
        assert all(not answer.is_cuda for answer in got)
        assert_close(got, bench.expected(module), TOLERANCE[dtype])


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    named = os.environ.get("VBERT_MODEL")
    found = [Path(named)] if named else sorted(path.parent for path in Path("shared/models").glob("*/config.json"))
    if found:
        return read_backbone(found[0])
    return read_backbone(write_backbone("12x384", tmp_path_factory.mktemp("minilm"), seed=0))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_backbone_equals_transformers(real, dtype, tmp_path):
    from transformers import AutoModel

    bench = DeviceBench(real, dtype, tmp_path)
    original = AutoModel.from_pretrained(real.folder, local_files_only=True, use_safetensors=True)
    original = original.to(DEVICE, torch.float32).eval()
    batch = bench.model.pack(bench.sequences(None))
    hidden, starts = bench.model.hidden(batch), batch.rows.cu_seqlens
    for j, i in enumerate(batch.order):
        encoded = bench.encoded[i]
        given = {"input_ids": torch.tensor([encoded.token_ids], device=DEVICE)}
        if real.config.type_vocab_size:
            given["token_type_ids"] = torch.tensor([encoded.type_ids], device=DEVICE)
        with torch.no_grad():
            want = original(**given).last_hidden_state[0]
        assert_hidden(hidden[starts[j] : starts[j + 1]], want, bench.model.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tenants_equal_peft(real, dtype, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    from benchmarks.equality_cases import peft_makers

    bench = DeviceBench(real, dtype, tmp_path)
    folders = [make(tmp_path / "-".join(name)) for name, make in peft_makers(real).items()]
    modules = [read_tenant(folder, real) for folder in folders]
    tenants = bench.on_device(modules)
    answers = iter(bench.forward([s for tenant in tenants for s in bench.sequences(tenant)]))
    for folder, module in zip(folders, modules, strict=True):
        for want in original_outputs(folder, real, module, bench.encoded):
            assert_answer(next(answers), want, bench.model.dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_replayed_graphs_equal_the_plain_forward(real, dtype, tmp_path):
    bench = DeviceBench(real, dtype, tmp_path, graphs=True)
    plain = Model.load(real, dtype, DEVICE)
    factory = Factory(real, seed=5)
    tenants = bench.on_device([factory.tenant("lora", "houlsby", "ia3", "bitfit") for _ in range(3)])
    everything = [s for tenant in tenants for s in bench.sequences(tenant)]
    longest = max(everything, key=lambda s: len(s.token_ids))
    signatures = []
    for seed in range(12):
        chosen = [longest, *random.Random(seed % 6).sample(everything, 12)]
        batch, other = bench.model.pack(chosen), plain.pack(chosen)
        signatures.append(Signature.of(batch))
        assert_close(bench.model.forward(batch), plain.forward(other), TOLERANCE[dtype])
    assert max(map(signatures.count, signatures)) >= 4, "no signature came often enough for a graph"


def test_a_forward_on_a_stream_of_its_own(real, tmp_path):
    bench = DeviceBench(real, "float32", tmp_path)
    (tenant,) = bench.on_device([Factory(real, seed=1).tenant("lora")])
    batch = bench.model.pack(bench.sequences(tenant))
    want = bench.model.forward(batch)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        finish = bench.model.launch(bench.model.pack(bench.sequences(tenant)))
    assert_close(finish(), want, 1e-5)


def test_a_long_text_beside_a_short_one(real, tmp_path):
    bench = DeviceBench(real, "bfloat16", tmp_path)
    lengths = real.config.max_length, 1, 7
    sequences = [SequenceInput([5] * n, [0] * n) for n in lengths]
    together = bench.forward(sequences)
    for got, sequence in zip(together, sequences, strict=True):
        assert_close([got], bench.forward([sequence]), 0.03)
