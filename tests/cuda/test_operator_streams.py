"""Operators on several streams of a real device give the answers of one stream, delayed or not, in a graph or not."""

import random
from functools import partial

import pytest
import torch

from benchmarks.workload import write_backbone
from tests.cuda.test_model import TOLERANCE, DeviceBench
from tests.encoder.test_laws import assert_close
from tests.random_tenants import Factory
from vbert.formats.transformers_folder import read_backbone
from vbert.model import Model

pytestmark = pytest.mark.cuda
KINDS = ("lora", "houlsby", "mask", "bitfit")
DTYPE = "bfloat16"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return read_backbone(write_backbone("12x384", tmp_path_factory.mktemp("minilm"), seed=0))


@pytest.fixture
def bench(backbone, tmp_path):
    return DeviceBench(backbone, DTYPE, tmp_path, operator_streams=1)


def sequences_of(bench, num_tenants=16):
    factory = Factory(bench.backbone, seed=5)
    tenants = bench.on_device([factory.tenant(KINDS[i % 4]) for i in range(num_tenants)])
    return [s for tenant in tenants for s in bench.sequences(tenant)[:3]]


def load(bench, num_streams, **how):
    return Model.load(bench.backbone, DTYPE, "cuda", operator_streams=num_streams, **how)


def late(run, chance, works):
    """Every work begins some time after it could, a part of a millisecond."""

    def delayed(work):
        torch.cuda._sleep(chance.randrange(300_000))
        work()

    run([partial(delayed, work) for work in works])


@pytest.mark.parametrize("num_streams", [2, 3, 4, 32])
def test_sixteen_tenants_of_four_kinds(bench, num_streams):
    sequences, model = sequences_of(bench), load(bench, num_streams)
    want = bench.forward(sequences)
    assert_close(model.forward(model.pack(sequences)), want, TOLERANCE[DTYPE] / 10)
    assert model._side_streams._streams
    model._side_streams = partial(late, model._side_streams, random.Random(num_streams))
    for _ in range(5):
        assert_close(model.forward(model.pack(sequences)), want, TOLERANCE[DTYPE] / 10)


@pytest.mark.parametrize("num_streams", [4, 0])
def test_graphs_of_several_streams(bench, num_streams):
    """0: captured with each number of streams, and the fastest kept."""
    sequences, model = sequences_of(bench), load(bench, num_streams, graphs=True)
    want = bench.forward(sequences)
    for _ in range(6):
        assert_close(model.forward(model.pack(sequences)), want, TOLERANCE[DTYPE])  # padded products differ in bits
    assert len(model._graphs._graphs) == 1
    assert model._side_streams._streams


def test_memory_of_a_forward_is_not_given_away_while_a_side_stream_uses_it(bench):
    """Forwards right behind each other, whose buffers torch hands on, with delays on every stream."""
    sequences, model = sequences_of(bench), load(bench, 4)
    want = bench.forward(sequences)
    model._side_streams = partial(late, model._side_streams, random.Random(0))
    batches = [model.pack(sequences) for _ in range(8)]
    for finish in [model.launch(batch) for batch in batches]:
        assert_close(finish(), want, TOLERANCE[DTYPE] / 10)
