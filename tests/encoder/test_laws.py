"""The laws of the system: a mixed batch equals each tenant alone equals the dense reference; order changes nothing."""

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.random_tenants import DELTA_KINDS, HEADS, Factory
from tests.tiny import TEXTS, tiny_backbone
from vbert.activations import activate, activate_
from vbert.arena import Arena
from vbert.checkpoint import write_tenant
from vbert.config import ACTIVATIONS, MODEL_TYPES
from vbert.formats.transformers_folder import read_backbone
from vbert.header import parse_header
from vbert.model import Model, SequenceInput
from vbert.reference import dense_forward, dense_hidden
from vbert.tokenizer import Tokenizer

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.06}  # of the largest number of the answer


@pytest.fixture(scope="module", params=MODEL_TYPES)
def backbone(request, tmp_path_factory):
    return read_backbone(tiny_backbone(request.param, tmp_path_factory.mktemp(request.param)))


class Bench:
    """A model, an arena and tenants loaded through the native file, as the runtime does it."""

    def __init__(self, backbone, dtype, folder):
        self.backbone, self.folder = backbone, folder
        self.model = Model.load(backbone, dtype)
        self.arena = Arena(backbone.config, backbone.fingerprint, self.model.dtype, 2**24)
        tokenizer = Tokenizer.load(backbone.folder, backbone.config)
        self.encoded = tokenizer.encode([*TEXTS, ("the cat", "on the mat")], max_length=40)

    def load(self, module):
        data = write_tenant(module)
        path = self.folder / hashlib.sha256(data).hexdigest()
        path.write_bytes(data)
        return self.arena.fill(self.arena.reserve(parse_header(data), path.name), path)

    def sequences(self, tenant):
        return [SequenceInput(e.token_ids, e.type_ids, tenant) for e in self.encoded]

    def forward(self, sequences):
        return self.model.forward(self.model.pack(sequences))

    def expected(self, module):
        return [dense_forward(self.backbone, module, e.token_ids, e.type_ids) for e in self.encoded]


def assert_close(got, want, tolerance):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


def all_kinds(factory):
    """One tenant of each kind, one of each head, and one that composes four kinds."""
    modules = [factory.tenant(kind) for kind in DELTA_KINDS]
    heads = [h for h in HEADS if h != "pooler" or factory.config.has_pooler]
    modules += [factory.tenant("lora", head=head, num_labels=1 + i) for i, head in enumerate(heads)]
    modules.append(factory.tenant("lora_all", "houlsby", "ia3", "mask", head="token_classify"))
    return modules


def test_the_bare_backbone_equals_the_dense_reference(backbone, tmp_path):
    bench = Bench(backbone, "float32", tmp_path)
    batch = bench.model.pack(bench.sequences(None))
    hidden, starts = bench.model.hidden(batch), batch.rows.cu_seqlens
    parts = [hidden[starts[j] : starts[j + 1]] for j in range(len(bench.encoded))]
    want = [dense_hidden(backbone, None, bench.encoded[i].token_ids, bench.encoded[i].type_ids) for i in batch.order]
    assert_close(parts, want, 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mixed_equals_alone_equals_dense(backbone, dtype, tmp_path):
    bench = Bench(backbone, dtype, tmp_path)
    modules = [*all_kinds(Factory(backbone, seed=3)), None]
    tenants = [module and bench.load(module) for module in modules]
    sequences = [s for tenant in tenants for s in bench.sequences(tenant)]
    where = list(range(len(sequences)))
    random.Random(0).shuffle(where)
    mixed = [None] * len(sequences)
    for i, answer in zip(where, bench.forward([sequences[i] for i in where]), strict=True):
        mixed[i] = answer
    n = len(bench.encoded)
    for t, (module, tenant) in enumerate(zip(modules, tenants, strict=True)):
        alone = bench.forward(bench.sequences(tenant))
        assert_close(mixed[t * n : (t + 1) * n], alone, TOLERANCE[dtype])
        assert_close(alone, bench.expected(module), TOLERANCE[dtype])


def test_every_tenant_answers_differently(backbone, tmp_path):
    """Were a delta ignored, its tenant would answer like the one without."""
    bench = Bench(backbone, "float32", tmp_path)
    head = Factory(backbone, seed=9).head("classify", 3)
    answers = []
    for kind in DELTA_KINDS:
        module = Factory(backbone, seed=4).tenant(kind)
        tenant = bench.load(type(module)(backbone_fingerprint=backbone.fingerprint, deltas=module.deltas, head=head))
        answers.append(torch.stack(bench.forward(bench.sequences(tenant))))
    for i, a in enumerate(answers):
        assert all((a - b).abs().max() > 1e-3 for b in answers[i + 1 :])


def test_evict_then_reload_is_the_identity(backbone, tmp_path):
    bench = Bench(backbone, "float32", tmp_path)
    factory = Factory(backbone, seed=5)
    module, other = factory.tenant("lora", "diff"), factory.tenant("lora", "diff")
    first = bench.load(module)
    before = bench.forward(bench.sequences(first))
    slots = first.slots
    bench.arena.release(first)
    assert not first.owned()
    second = bench.load(other)  # takes the slot that became free
    assert [slot for _, slot in second.slots][:1] == [slot for _, slot in slots][:1]
    bench.arena.release(second)
    again = bench.load(module)
    assert all(torch.equal(a, b) for a, b in zip(before, bench.forward(bench.sequences(again)), strict=True))


def test_threads_may_share_a_model(backbone, tmp_path):
    """Intermediate results of one forward never show in another."""
    bench = Bench(backbone, "float32", tmp_path)
    batches = [bench.model.pack(bench.sequences(None)[i:]) for i in range(4)]
    want = [bench.model.hidden(batch) for batch in batches]
    with ThreadPoolExecutor(len(batches)) as pool:
        for _ in range(20):
            for got, expected in zip(pool.map(bench.model.hidden, batches), want, strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activation_in_place_is_the_same_function(name):
    x = torch.linspace(-6, 6, 101)
    want = activate(x, name)
    assert torch.equal(activate_(x, name), want)
    assert torch.equal(x, want)
