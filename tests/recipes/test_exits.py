"""Exits are trained with their tenant, and how sure is sure enough is found on dev."""

import numpy as np
import pytest
import torch

from training.exits import Judged, lowest_threshold
from training.train_peft import run
from vbert.checkpoint import read_tenant_bytes
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import read_backbone
from vbert.reference import dense_forward


def test_exits_are_written_with_self_tests_that_the_dense_reference_gives(make_config):
    config = make_config("classify", exits=(1,), top_layers=1, epochs=4)
    report = run(config)
    module, backbone = read_tenant_bytes(report.path.read_bytes()), read_backbone(config.backbone)
    assert [each.layer for each in module.exits] == [1]
    assert {test.exit for test in module.self_tests} == {0, 1}
    for test in module.self_tests:
        want = dense_forward(backbone, module, test.token_ids, test.type_ids, test.path, test.exit)
        torch.testing.assert_close(test.expected, want, rtol=0, atol=1e-4)
    assert module.exit_threshold == report.exits["threshold"]
    assert report.exits["dev"]["accuracy"] >= report.dev["accuracy"]
    assert set(report.exits) == {"threshold", "dev", "test"}


def test_an_exit_learns(make_config):
    report = run(make_config("classify", exits=(1,), epochs=12))
    assert report.exits["dev"]["accuracy"] == 1
    assert report.exits["dev"]["left"]["1"] > 0.5
    assert report.exits["dev"]["layers"] < 0.8


def judged(sure, right):
    return Judged(torch.tensor(sure), torch.tensor(right), torch.tensor([1, 2, 4]))


def test_the_lowest_confidence_that_costs_nothing():
    sure = [[0.9, 0.95], [0.3, 0.8], [0.5, 0.6], [0.2, 0.3]]
    right = [[True, True, True], [False, True, True], [False, False, True], [False, False, False]]
    each = judged(sure, right)
    assert each.taken(0.7).tolist() == [0, 1, 2, 2]
    assert each.accuracy(0.7) == 0.75
    assert each.taken(0.55).tolist() == [0, 1, 1, 2]
    assert lowest_threshold([each], 0.0) == 0.6  # at 0.59 the third text leaves with a wrong answer
    assert lowest_threshold([each], 0.25) == 0.3
    report = each.report(0.6)
    assert report["left"] == {"1": 0.25, "2": 0.25}
    assert report["layers"] == pytest.approx(np.mean([1, 2, 4, 4]) / 4)


def test_where_every_exit_costs_nobody_leaves():
    each = judged([[1.0, 1.0]], [[False, False, True]])
    assert lowest_threshold([each], 0.0) == 1.0
    assert each.taken(1.0).tolist() == [2]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"exits": (0,)}, "give layers from 1 to 1"),
        ({"exits": (2,)}, "give layers from 1 to 1"),
        ({"exits": (1,), "task": "regression"}, "of classifiers"),
    ],
)
def test_exits_that_there_cannot_be(make_config, settings, says):
    with pytest.raises(ConfigError, match=says):
        run(make_config(**settings))
