"""Batches whose sequences enter at different layers, for every backbone type: the plain batch's answers."""

import random
from dataclasses import replace

import pytest
import torch

from tests.encoder.test_laws import TOLERANCE, Bench, assert_close
from tests.random_tenants import DELTA_KINDS, Factory
from tests.tiny import tiny_backbone
from vbert.config import MODEL_TYPES
from vbert.errors import ShapeError
from vbert.formats.transformers_folder import read_backbone
from vbert.packing import Ways

LAYER = 2


@pytest.fixture(scope="module", params=MODEL_TYPES)
def backbone(request, tmp_path_factory):
    return read_backbone(tiny_backbone(request.param, tmp_path_factory.mktemp(request.param), num_layers=4))


class Given:
    """The feed of a forward alone: states for those that have them, and what it wants kept."""

    def __init__(self, rows):
        self.rows, self.kept = rows, torch.empty(0, rows.shape[1], dtype=rows.dtype)

    def word_rows(self):
        return None

    def given_rows(self):
        return self.rows

    def keep(self, rows):
        self.kept = rows

    def exited(self, layers):
        self.exits = layers

    def before_layer(self, i):
        pass


def tenants_of(bench, backbone):
    """Every kind in the upper layers, two that change lower ones, and the bare backbone."""
    factory = Factory(backbone, seed=5)
    modules = [factory.tenant(kind) for kind in DELTA_KINDS]
    modules = [replace(m, deltas=tuple(d for d in m.deltas if d.layer >= LAYER)) for m in modules]
    low = [factory.tenant("lora"), factory.tenant("bitfit")]
    return [*map(bench.load, modules), None], [bench.load(module) for module in low]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_any_way_to_enter_gives_the_answers_of_the_plain_batch(backbone, dtype, tmp_path):
    bench, rng = Bench(backbone, dtype, tmp_path), random.Random(1)
    high, low = tenants_of(bench, backbone)
    stored = {}
    for _ in range(6):
        sequences = [s for tenant in (*high, *low) for s in rng.sample(bench.sequences(tenant), 2)]
        rng.shuffle(sequences)
        shares = [s.tenant in high for s in sequences]
        first = [i if not shares[i] else next(j for j in range(i + 1) if shares[j] and _same(sequences, i, j))
                 for i in range(len(sequences))]  # fmt: skip
        given = [i for i in range(len(sequences)) if shares[i] and first[i] == i and _ids(sequences[i]) in stored]
        width = backbone.config.hidden_size
        feed = Given(
            torch.cat([torch.empty(0, width, dtype=bench.model.dtype)] + [stored[_ids(sequences[i])] for i in given])
        )
        missing = [i for i in range(len(sequences)) if shares[i] and first[i] == i and i not in given]
        batch = bench.model.pack_joined(
            sequences, Ways(layer=LAYER, first=first, given=given, shares=shares, wanted=missing)
        )
        assert_close(bench.model.forward(batch, feed), bench.forward(sequences), TOLERANCE[dtype])
        kept = torch.split(feed.kept, [len(sequences[i].token_ids) for i in missing])
        stored |= {_ids(sequences[i]): rows for i, rows in zip(missing, kept, strict=True)}
        if not any(shares[i] and first[i] == i for i in missing):
            break
    assert len(stored) == len(bench.encoded)


def test_a_batch_of_given_states_computes_no_lower_layer(backbone, tmp_path):
    bench = Bench(backbone, "float32", tmp_path)
    (sequence, *_), low = bench.sequences(None), bench.load(Factory(backbone, seed=5).tenant("lora"))
    feed = Given(torch.empty(0, backbone.config.hidden_size))
    how = {"layer": LAYER, "first": [0], "shares": [True]}
    first = bench.model.forward(bench.model.pack_joined([sequence], Ways(given=[], wanted=[0], **how)), feed)
    batch = bench.model.pack_joined([sequence], Ways(given=[0], wanted=[], **how))
    assert batch.entering is None
    assert_close(bench.model.forward(batch, Given(feed.kept)), first, 1e-6)
    with pytest.raises(ShapeError, match="needs a feed"):
        bench.model.forward(batch)
    other = replace(sequence, tenant=low)
    mine = bench.model.pack_joined([other], Ways(layer=LAYER, first=[0], shares=[False]))
    assert mine.entering.tenants == (low,)


def _ids(sequence):
    return tuple(sequence.token_ids), tuple(sequence.type_ids)


def _same(sequences, i, j):
    return _ids(sequences[i]) == _ids(sequences[j])
