"""The loop learns, keeps the best epoch, repeats itself, and what it writes computes what was trained."""

import dataclasses
import hashlib

import pytest
import torch

from tests.recipes.conftest import write_rows
from tests.tiny import tiny_backbone
from training.batches import Dataset
from training.build import build_model
from training.data import Row, tokenise
from training.loop import FitSettings, fit
from training.model import PaddedBatch
from training.progress import silent
from training.train_peft import run
from vbert.arena import Arena
from vbert.checkpoint import read_tenant_bytes
from vbert.config import MODEL_TYPES
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import read_backbone
from vbert.header import parse_header
from vbert.model import Model, SequenceInput
from vbert.reference import dense_forward
from vbert.selftest import check_outputs
from vbert.tokenizer import Tokenizer

METHODS = {
    "lora": {"targets": ("q", "v", "ffn_up", "ffn_down"), "lora_dropout": 0.1},
    "houlsby": {"method": "bottleneck", "placement": "houlsby"},
    "pfeiffer": {"method": "bottleneck", "placement": "pfeiffer", "activation": "relu"},
    "parallel": {"method": "bottleneck", "placement": "parallel"},
    "bitfit": {"method": "bitfit"},
    "head": {"method": "head", "inner_size": 8},
}
TASKS = ("classify", "pairs", "regression", "token_classify")


def assert_serves_what_was_trained(report, backbone):
    """The file gives its self-test numbers in the dense reference and in the packed model that serves."""
    data = report.path.read_bytes()
    module = read_tenant_bytes(data)
    assert len(module.self_tests) == 4
    for test in module.self_tests:
        got = dense_forward(backbone, module, test.token_ids, test.type_ids)
        assert (got - test.expected).abs().max() < 1e-4
    model = Model.load(backbone, "float32")
    arena = Arena(backbone.config, backbone.fingerprint, model.dtype, 2**22)
    tenant = arena.fill(arena.reserve(parse_header(data), hashlib.sha256(data).hexdigest()), report.path)
    inputs = [SequenceInput(t.token_ids.tolist(), t.type_ids.tolist(), tenant) for t in module.self_tests]
    check_outputs(module.self_tests, model.forward(model.pack(inputs)), torch.float32)
    return module


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_served_is_what_was_trained(make_config, task, method):
    config = make_config(task, **METHODS[method])
    report = run(config)
    module = assert_serves_what_was_trained(report, read_backbone(config.backbone))
    assert report.num_bytes == report.path.stat().st_size
    assert module.source["results"]["test"] == report.test
    assert bool(module.deltas) == (method != "head")


@pytest.mark.parametrize("model_type", MODEL_TYPES[1:])
@pytest.mark.parametrize("method", ["lora", "bitfit", "pfeiffer"])
def test_every_kind_of_backbone_trains(make_config, tmp_path, model_type, method):
    folder = tiny_backbone(model_type, tmp_path / model_type)
    report = run(make_config("pairs", backbone=str(folder), **METHODS[method]))
    assert_serves_what_was_trained(report, read_backbone(folder))


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(make_config, method):
    report = run(make_config(epochs=5, head_lr=0.02, **METHODS[method]))
    assert report.losses[-1] < report.losses[0]


@pytest.mark.parametrize(
    ("task", "metric"), [("classify", "macro_f1"), ("token_classify", "span_f1"), ("regression", "pearson")]
)
def test_it_learns(make_config, task, metric):
    report = run(make_config(task, epochs=12))
    assert report.test[metric] > 0.9
    assert report.dev_metric == max(report.dev_metrics) == report.dev_metrics[report.best_epoch - 1]


def test_the_same_seed_gives_the_same_file_and_another_seed_another(make_config):
    config = make_config("classify", lora_dropout=0.2, head_dropout=0.1)
    state = torch.get_rng_state()
    first, again, other = (run(c).path.read_bytes() for c in (config, config, dataclasses.replace(config, seed=1)))
    assert first == again
    assert first != other
    assert torch.equal(state, torch.get_rng_state())


def test_frozen_rows_change_nothing(make_config):
    for settings in ({"top_layers": 1}, {"method": "head"}, {"method": "head", "pooling": "cls"}):
        kept, computed = (run(make_config(**settings, frozen_cache_bytes=size)) for size in (2**20, 0))
        assert kept.losses == pytest.approx(computed.losses, abs=1e-5)
        assert kept.dev_metrics == computed.dev_metrics


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["classify", "token_classify"])
def test_in_bfloat16_products_differ_and_what_is_written_is_float32(make_config, task, method):
    half, whole = (
        run(make_config(task, top_layers=1, dtype=dtype, **METHODS[method])) for dtype in ("bfloat16", "float32")
    )
    assert half.losses != whole.losses
    assert half.losses == pytest.approx(whole.losses, rel=0.05)
    assert_serves_what_was_trained(half, read_backbone(make_config().backbone))


def test_a_model_whose_products_were_halved_computes_as_before_afterwards(make_config):
    config = make_config()
    backbone = read_backbone(config.backbone)
    model = build_model(config, backbone, ("a", "b")).eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    batch = PaddedBatch(mask=ids > 0, token_ids=ids, type_ids=ids * 0)
    before = model(batch)
    model.halve_products(True)
    half = model(batch)
    model.halve_products(False)
    assert half.dtype == torch.float32
    assert not torch.equal(half, before)
    torch.testing.assert_close(half, before, rtol=0.05, atol=0.05)
    assert torch.equal(model(batch), before)


def test_deltas_lie_in_the_top_layers_only(make_config):
    module = read_tenant_bytes(run(make_config(top_layers=1)).path.read_bytes())
    assert {delta.layer for delta in module.deltas} == {1}
    with pytest.raises(ConfigError, match="top_layers is 3 and the backbone has 2"):
        run(make_config(top_layers=3))


def tiny_fit(make_config, dev_metrics, **settings):
    """Fit with scripted dev metrics; returns the report, the final state and the states at the end of each epoch."""
    config = make_config(epochs=len(dev_metrics), **settings)
    backbone = read_backbone(config.backbone)
    rows = [Row("the cat", "a", ""), Row("the station", "b", "")] * 4
    data = Dataset(tokenise(rows, Tokenizer.load(backbone.folder, backbone.config), ("a", "b"), 20))
    model = build_model(config, backbone, ("a", "b"))
    states = []

    def dev_metric():
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return dev_metrics[len(states) - 1]

    wanted = {each.name: getattr(config, each.name) for each in dataclasses.fields(FitSettings)}
    report = fit(model, data, dev_metric, FitSettings(**wanted), silent)
    return report, model.state_dict(), states


def test_the_best_epoch_is_kept(make_config):
    report, final, states = tiny_fit(make_config, [0.3, 0.9, 0.5, 0.9])
    assert report.best_epoch == 1
    assert all(torch.equal(final[name], states[1][name]) for name in final)
    assert any(not torch.equal(final[name], states[3][name]) for name in final)


def test_a_loss_that_is_no_number_stops_the_run(make_config):
    with pytest.raises(ConfigError, match=r"the loss is nan with lr .* lower them"):
        tiny_fit(make_config, [0.0] * 3, lr=1e30, head_lr=1e30)


def test_a_row_whose_words_leave_no_token_does_no_harm(make_config, tmp_path):
    rows = [{"tokens": ["\u200b"], "tags": ["O"]}, {"tokens": ["cat"], "tags": ["B-x"]}]
    files = {"train": write_rows(tmp_path / "empty.jsonl", rows), "dev": "", "test": ""}
    report = run(make_config("token_classify", **files, dev_share=0.5))
    assert all(loss >= 0 for loss in report.losses)


def test_without_a_dev_file_rows_are_held_out(make_config):
    report = run(make_config(dev="", dev_share=0.25))
    assert report.num_train_rows == 18
    with pytest.raises(ConfigError, match="leaves dev or train empty"):
        run(make_config(dev="", dev_share=0.001))


def test_fewer_rows_keep_all_labels(make_config):
    report = run(make_config(max_train_rows=1))
    assert (report.num_train_rows, report.num_labels) == (1, 2)


def test_nothing_is_written_when_training_fails(make_config, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}")
    config = make_config(test=str(tmp_path / "bad.jsonl"))
    with pytest.raises(Exception, match=r"bad\.jsonl line 1"):
        run(config)
    assert not (tmp_path / "out").exists()


def test_progress_is_told_to_the_end(make_config):
    told = []
    run(make_config(top_layers=1), progress=lambda what, done, total: told.append((what, done, total)))
    assert [(done, total) for what, done, total in told if what == "layers below"][-1] == (24, 24)
    assert told[-1][1] == told[-1][2] == 8
    assert all(0 < done <= total for _, done, total in told)


@pytest.mark.parametrize("missing", ["backbone", "train", "out"])
def test_a_path_that_is_not_set_is_named(make_config, missing):
    with pytest.raises(ConfigError, match=f"{missing} is not set"):
        run(make_config(**{missing: ""}))


def test_what_cannot_end_well_is_refused_before_it_begins(make_config, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "t.safetensors"):
        with pytest.raises(ConfigError, match="cannot be written"):
            run(make_config(out=str(out)))
    one = write_rows(tmp_path / "one.jsonl", [{"text": "the cat", "label": "a"}] * 8)
    with pytest.raises(ConfigError, match="has one label, 'a'"):
        run(make_config(train=one))
    for wrong in ({"targets": ()}, {"seed": 2**63}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            make_config(**wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named(make_config):
    with pytest.raises(ConfigError, match="device is cuda"):
        run(make_config(device="cuda"))
