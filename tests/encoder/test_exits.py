"""Early exit: whoever leaves, and whoever stays, has the answer it has alone, whatever else is in the batch."""

import random
from dataclasses import replace

import pytest
import torch

from tests.encoder.test_junction import Given
from tests.encoder.test_laws import Bench, assert_close
from tests.random_tenants import Factory
from tests.tiny import tiny_backbone
from vbert.config import MODEL_TYPES
from vbert.exits import confidences
from vbert.formats.transformers_folder import read_backbone
from vbert.packing import Ways
from vbert.reference import dense_forward

LAYER = 2  # of the junction


@pytest.fixture(scope="module", params=MODEL_TYPES)
def backbone(request, tmp_path_factory):
    return read_backbone(tiny_backbone(request.param, tmp_path_factory.mktemp(request.param), num_layers=4))


class Exiting:
    """Tenants with exits before various layers, one without, the bare backbone; and what each should answer."""

    def __init__(self, backbone, folder):
        self.bench = Bench(backbone, "float32", folder)
        factory = Factory(backbone, seed=11)
        modules = [
            factory.with_exits(factory.tenant("lora"), 1, 2, 3),
            factory.with_exits(factory.tenant("houlsby", head="multi_label"), 2),
            factory.with_exits(factory.tenant("none", num_labels=5), 3),
            factory.with_exits(factory.tenant("lora_all"), 1, 3),
            factory.tenant("mask"),
        ]
        for i in (1, 2):  # these leave the layers below the junction alone
            high = tuple(d for d in modules[i].deltas if d.layer >= LAYER)
            modules[i] = replace(modules[i], deltas=high)
        self.modules = {self.bench.load(module): module for module in modules} | {None: None}

    def sequences(self, rng, threshold):
        """Some for each tenant, in any order."""
        given = [
            replace(s, exit_above=threshold)
            for tenant in self.modules
            for s in rng.sample(self.bench.sequences(tenant), 3)
        ]
        rng.shuffle(given)
        return given

    def expected(self, sequence):
        """By the dense reference: the answer, and the layer before which it leaves."""
        module = self.modules[sequence.tenant]
        of = (self.bench.backbone, module, sequence.token_ids, sequence.type_ids, "plain")
        for each in () if module is None else module.exits:
            answer = dense_forward(*of, each.layer)
            (confidence,) = confidences([answer], [each.head])
            assert abs(confidence - sequence.exit_above) > 1e-4, "the test has no answer on the edge"
            if sequence.exit_from <= each.layer and confidence > sequence.exit_above:
                return answer, each.layer
        return dense_forward(*of), 0


@pytest.fixture
def exiting(backbone, tmp_path):
    return Exiting(backbone, tmp_path)


def told(exiting, batch, feed=None):
    feed = feed or Given(torch.empty(0, exiting.bench.backbone.config.hidden_size))
    return exiting.bench.model.forward(batch, feed), feed.exits


@pytest.mark.parametrize("threshold", [0.35, 0.5, 0.65])
def test_a_mixed_batch_equals_each_alone_in_the_dense_reference(exiting, threshold):
    sequences = exiting.sequences(random.Random(3), threshold)
    answers, exits = told(exiting, exiting.bench.model.pack(sequences))
    want = [exiting.expected(sequence) for sequence in sequences]
    assert list(exits) == [layer for _, layer in want]
    assert_close(answers, [answer for answer, _ in want], 1e-4)
    assert any(exits)
    assert not all(exits)


@pytest.mark.parametrize("threshold", [0.35, 0.5, 0.65])
def test_lower_layers_that_others_share_change_nothing(exiting, threshold):
    """With a junction before layer 2: some leave below it, some at it, some above."""
    rng = random.Random(4)
    sequences = exiting.sequences(rng, threshold)
    high = [
        s.tenant is None or s.tenant.header.lowest_layer is None or s.tenant.header.lowest_layer >= LAYER
        for s in sequences
    ]
    assert any(high)
    assert not all(high)
    wanted = [i for i, fits in enumerate(high) if fits]
    ways = Ways(layer=LAYER, first=range(len(sequences)), shares=high, wanted=wanted)
    answers, exits = told(exiting, exiting.bench.model.pack_joined(sequences, ways))
    want = [exiting.expected(sequence) for sequence in sequences]
    assert list(exits) == [layer for _, layer in want]
    assert_close(answers, [answer for answer, _ in want], 1e-4)
    batch = exiting.bench.model.pack_joined(sequences, ways)
    lengths = [len(s.token_ids) for s in sequences]
    rows = sum(n * max(layer or 4, LAYER) for n, layer in zip(lengths, exits, strict=True))  # all come to the junction
    assert batch.work(4, exits=exits) == pytest.approx(rows / (4 * sum(lengths)))


def test_sequences_that_share_their_lower_layers_leave_each_by_their_own_exits(exiting):
    tenants = [t for t in exiting.modules if t is not None and (t.header.lowest_layer or 0) >= LAYER]
    sequences = [replace(exiting.bench.sequences(t)[0], exit_above=-1.0) for t in tenants]
    ways = Ways(layer=LAYER, first=[0] * len(sequences), shares=[True] * len(sequences))
    answers, exits = told(exiting, exiting.bench.model.pack_joined(sequences, ways))
    want = [exiting.expected(sequence) for sequence in sequences]
    assert list(exits) == [layer for _, layer in want]
    assert_close(answers, [answer for answer, _ in want], 1e-4)


def test_the_limits_are_no_exit_and_the_first_one(exiting):
    rng = random.Random(5)
    everywhere = exiting.sequences(rng, 1.0)
    plain = exiting.bench.model.pack(everywhere)
    assert not plain.exits
    at_once = [replace(s, exit_above=-1.0) for s in everywhere]
    answers, exits = told(exiting, exiting.bench.model.pack(at_once))
    firsts = [s.tenant.exits[0].layer if s.tenant is not None and s.tenant.exits else 0 for s in everywhere]
    assert list(exits) == firsts
    late = [replace(s, exit_from=3) for s in at_once]
    assert {3, 0} == {*told(exiting, exiting.bench.model.pack(late))[1]}
    only = [s for s in at_once if s.tenant is not None and s.tenant.exits]
    answers, exits = told(exiting, exiting.bench.model.pack(only))
    assert all(exits)
    assert_close(answers, [exiting.expected(s)[0] for s in only], 1e-4)


def test_a_lower_threshold_never_lets_anyone_leave_later(exiting):
    sequences, last = exiting.sequences(random.Random(6), 0.0), None
    for threshold in (0.2, 0.4, 0.6, 0.8, 0.95):
        batch = exiting.bench.model.pack([replace(s, exit_above=threshold) for s in sequences])
        exits = [layer or 4 for layer in told(exiting, batch)[1] or [0] * len(sequences)]
        assert last is None or all(now >= before for now, before in zip(exits, last, strict=True))
        last = exits


def test_what_is_saved_is_counted(exiting):
    sequences = exiting.sequences(random.Random(7), -1.0)
    batch = exiting.bench.model.pack(sequences)
    _, exits = told(exiting, batch)
    rows = [len(s.token_ids) * (layer or 4) for s, layer in zip(sequences, exits, strict=True)]
    share = sum(rows) / (4 * sum(len(s.token_ids) for s in sequences))
    assert batch.work(4, exits=exits) == pytest.approx(share)
    assert batch.work(4) == 1


def test_the_confidence_of_labels_that_do_not_exclude_each_other(exiting):
    multi = next(m.head for m in exiting.modules.values() if m is not None and m.head.problem == "multi_label")
    sure, unsure = torch.tensor([4.0, -5.0, 3.0]), torch.tensor([4.0, -0.1, 3.0])
    found = confidences([sure, unsure], [multi, multi])
    assert found == pytest.approx([torch.sigmoid(torch.tensor(3.0)).item(), torch.sigmoid(torch.tensor(0.1)).item()])
