"""What a GPU runs of the model, without one: CUDA operators emulated, graphs replayed by calling the function again."""

import random
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.encoder.test_laws import Bench, all_kinds, assert_close
from tests.kernels import emulator
from tests.random_tenants import Factory
from tests.tiny import tiny_backbone
from vbert import attention, graphs, heads
from vbert.batch import copy_integers
from vbert.encoder import Encoder
from vbert.errors import KernelUnavailable
from vbert.formats.transformers_folder import read_backbone
from vbert.graphs import HiddenGraphs, Signature, round_up
from vbert.heads import run_heads
from vbert.kernels import backend, cuda
from vbert.model import Model, SequenceInput, resolve_device, resolve_dtype
from vbert.tenant import Dense, Head


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return read_backbone(tiny_backbone("bert", tmp_path_factory.mktemp("bert")))


@pytest.fixture
def bench(backbone, tmp_path, monkeypatch):
    """Float32, with the operators of a GPU."""
    if emulator.COMPILER is None:
        pytest.skip("no C++ compiler (g++ or clang++) on PATH")
    monkeypatch.setattr(cuda, "launcher", emulator.launch)
    monkeypatch.setitem(backend.OF_DEVICE, "cpu", backend.Backend.CUDA)
    return Bench(backbone, "float32", tmp_path)


@pytest.mark.slow
def test_every_kind_of_tenant_equals_the_dense_reference(bench, backbone):
    modules = [*all_kinds(Factory(backbone, seed=3)), None]
    tenants = [module and bench.load(module) for module in modules]
    answers = iter(bench.forward([s for tenant in tenants for s in bench.sequences(tenant)[:2]]))
    for module in modules:
        assert_close([next(answers), next(answers)], bench.expected(module)[:2], 1e-4)


def repeat(function):
    """A `Capture` that computes again."""
    out = function()
    return lambda: out.copy_(function()), out


def each_sequence_alone(q, k, v, cu_seqlens, _, longest, __):
    """`varlen_attn`, for a CPU. What no sequence holds is not a number, as memory nobody wrote may be."""
    out = torch.full_like(q, float("nan"))
    bounds = cu_seqlens.tolist()
    for i, j in pairwise(bounds):
        assert j - i <= longest
        if j > i:
            parts = (part[i:j].transpose(0, 1) for part in (q, k, v))
            out[i:j] = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(0, 1)
    return out


@pytest.mark.slow
def test_a_replayed_graph_equals_the_plain_forward(bench, backbone, monkeypatch):
    """Batches of one signature differ in texts, lengths, and in which tenants and slots they use."""
    factory = Factory(backbone, seed=5)
    tenants = [bench.load(factory.tenant(*kinds)) for kinds in [("lora", "houlsby", "ia3", "bitfit")] * 3]
    everything = [s for tenant in tenants for s in bench.sequences(tenant)]
    longest = max(everything, key=lambda s: len(s.token_ids))
    batches = [bench.model.pack([longest, *random.Random(i).sample(everything, 8)]) for i in range(4)]
    plain = [bench.model.hidden(batch) for batch in batches]

    monkeypatch.setattr(Encoder, "takes_varlen", True)
    monkeypatch.setattr(attention, "varlen_attn", each_sequence_alone)
    monkeypatch.setattr(graphs, "round_up", lambda n, least: 256 if least > 8 else 32)
    found = HiddenGraphs(bench.model._layers, bench.model._new_space, repeat)
    assert [found.find(batches[0]) for _ in range(2)] == [None, None]
    waited = []
    graph = found.find(batches[0], lambda: waited.append("for every layer"))
    assert waited == ["for every layer"]  # the capture computes the batch
    with torch.inference_mode():
        for batch, want in zip(batches, plain, strict=True):
            assert found.find(batch) is graph
            assert_close([graph.run(batch)], [want], 1e-5)


def test_a_batch_arrives_on_a_device_as_it_was_packed(backbone):
    """The integers of a batch with padded attention, through the one buffer that carries them."""
    model = Model.load(backbone, "float32", "cpu")
    batch = model.pack([SequenceInput(range(5, 5 + n), [0] * n) for n in (3, 40, 38, 5, 1)])
    there = iter(copy_integers(batch.rows.arrays(buckets=True), torch.device("cpu")))
    moved = batch.rows.moved(there, buckets=True)
    assert next(there, None) is None
    assert moved.cu_seqlens_dev.tolist() == batch.rows.cu_seqlens.tolist()
    assert moved.token_ids.dtype == torch.int32
    assert torch.equal(model.hidden(replace(batch, rows=moved)), model.hidden(batch))


def test_signatures_repeat_and_bound_their_batches(backbone):
    model = Model.load(backbone, "float32", "cpu")

    def signature(*lengths):
        batch = model.pack([SequenceInput([5] * n, [0] * n) for n in lengths])
        found = Signature.of(batch)
        assert len(found.integers(batch)) == sum(found.sizes)
        assert (found.tokens, found.sequences, found.longest) >= (sum(lengths), len(lengths), max(lengths))
        return found

    assert signature(20, 21) == signature(30, 2, 3)
    assert signature(20, 21) != signature(40, 21)
    assert signature(64) != signature(65)
    for n in range(1, 5000, 7):
        assert n <= round_up(n, 8) <= max(n + 7, n * 9 / 8)


def test_the_least_recently_used_graph_goes(backbone, monkeypatch):
    monkeypatch.setattr(Encoder, "takes_varlen", True)
    monkeypatch.setattr(attention, "varlen_attn", each_sequence_alone)
    monkeypatch.setattr(graphs, "_MAX_GRAPHS", 2)
    model = Model.load(backbone, "float32", "cpu")
    found = HiddenGraphs(model._layers, model._new_space, repeat)
    batches = [model.pack([SequenceInput([5] * 30, [0] * 30)] * n) for n in (1, 3, 5)]
    with torch.inference_mode():
        first, second = ([found.find(batch) for _ in range(3)][-1] for batch in batches[:2])
        assert first is not None
        assert second is not None
        assert found.find(batches[0]) is first
        assert [found.find(batches[2]) for _ in range(3)][-1] is not None
        assert found.find(batches[0]) is first
        assert found.find(batches[1]) is None


def test_a_graph_is_captured_for_the_fastest_number_of_streams(backbone, monkeypatch):
    monkeypatch.setattr(Encoder, "takes_varlen", True)
    monkeypatch.setattr(attention, "varlen_attn", each_sequence_alone)
    monkeypatch.setattr(graphs, "_replay_ms", lambda captured: captured[0]())
    model, captured = Model.load(backbone, "float32", "cpu"), []
    milliseconds = {1: 3.0, 2: 1.0, 4: 2.0}

    def forward(batch, space, num_streams):
        captured.append(num_streams)
        return model._layers(batch, space) * 0 + num_streams

    def capture(function):
        out = function()
        milliseconds_of = milliseconds[captured[-1]]
        return lambda: milliseconds_of, out

    batch = model.pack([SequenceInput([5] * 30, [0] * 30)])
    with torch.inference_mode():
        found = HiddenGraphs(forward, model._new_space, capture, lambda _: (1, 2, 4))
        graph = [found.find(batch) for _ in range(3)][-1]
        assert captured == [1, 2, 4]
        assert graph.run(batch).unique().tolist() == [2]


def test_classes_that_share_rows_make_another_signature(backbone, tmp_path):
    """One graph for both would run the classes of one tenant side by side."""
    bench, factory = Bench(backbone, "float32", tmp_path), Factory(backbone, seed=5)
    lora, ia3, both = (bench.load(factory.tenant(*kinds)) for kinds in (["lora"], ["ia3"], ["lora", "ia3"]))

    def signature(*tenants):
        return Signature.of(bench.model.pack([SequenceInput([5] * 30, [0] * 30, tenant) for tenant in tenants]))

    apart, together = signature(lora, ia3), signature(both, both)
    assert set(apart.classes) == set(together.classes)
    assert (apart.groups, together.groups) == ((0, 1), (0, 0))
    assert signature(lora, both).groups == (0, 0)


def test_heads_of_one_shape_share_their_products(monkeypatch):
    """As on a GPU, where `run_heads` groups by shape."""

    def head(seed, **more):
        weights = torch.Generator().manual_seed(seed)
        layers = [
            Dense(weight=torch.randn(8, 6, generator=weights), bias=None, activation="tanh"),
            Dense(weight=torch.randn(3, 8, generator=weights), bias=torch.randn(3, generator=weights)),
        ]
        return Head(kind="classify", layers=tuple(layers), **more)

    a, b, c = head(1), head(2), head(3, pooling="mean")
    d, e = head(4, pooling="none"), head(5, pooling="none")
    given = [a, a, b, a, c, c, d, e, e, d]
    bounds = np.array([0, 3, 6, 9, 12, 15, 18, 18 + 40, 59, 59 + 16, 75 + 17])
    hidden = torch.randn(92, 6)
    want = run_heads(hidden, bounds, given, None)
    monkeypatch.setattr(heads, "_same_work", heads._same_shape)
    calls, each = [], heads._each_with_its_own
    monkeypatch.setattr(heads, "_each_with_its_own", lambda *given: calls.append(given) or each(*given))
    assert_close(run_heads(hidden, bounds, given, None), want, 1e-6)
    assert len(calls) == 2  # a and b; d and e
    monkeypatch.setattr(heads, "_MOST_COPIED", 8 * 6)
    assert_close(run_heads(hidden, bounds, given, None), want, 1e-6)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(KernelUnavailable, match="torch sees no CUDA device"):
        resolve_device("cuda")
    with pytest.raises(KernelUnavailable, match="float16"):
        resolve_dtype("float16", torch.device("cpu"))
    assert resolve_dtype("auto", torch.device("cuda", 0)) is torch.bfloat16


def test_a_gpu_without_cupy_is_refused_with_the_remedy(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    with pytest.raises(KernelUnavailable, match=r"vbert\[cuda1"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")
    assert "cupy is missing" in caplog.text
