"""A tenant that learns from another one: the task stage of a distillation."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.ngram.test_local_layers import random_student
from tests.recipes.conftest import rows_of, write_rows
from tests.tiny import tiny_backbone
from training import loop
from training.build import build_model
from training.config import TrainConfig
from training.distill_losses import relative_error, score_error
from training.export_skip import write_folder
from training.model import PaddedBatch, Traced
from training.skip_student import Batch, Teacher
from training.task_teacher import TaskLoss, TaskTeacher
from training.train_peft import run
from vbert.checkpoint import read_tenant_bytes
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import read_backbone
from vbert.reference import dense_forward, dense_hidden


@pytest.fixture
def taught(make_config, tmp_path):
    """A teacher that knows its task, and a function that makes the config of a student."""
    teacher = tmp_path / "teacher.safetensors"
    run(replace(make_config("classify"), out=str(teacher), epochs=12))

    def config(**settings):
        return make_config("classify", **({"teacher": str(teacher)} | settings))

    return config


def batch_of(ids):
    return Batch(ids[None], torch.zeros_like(ids)[None], torch.ones(1, len(ids), dtype=torch.bool))


def test_the_teacher_says_what_the_dense_reference_says(taught):
    config = taught()
    backbone, module = read_backbone(config.backbone), read_tenant_bytes(Path(config.teacher).read_bytes())
    teacher = TaskTeacher.load(config, backbone, module.head.labels)
    ids = torch.tensor([5, 9, 11, 6])
    states, answer = teacher(batch_of(ids))
    want = dense_forward(backbone, module, ids, ids * 0)
    torch.testing.assert_close(answer[0], want, rtol=0, atol=1e-5)
    torch.testing.assert_close(states[-1][0], dense_hidden(backbone, module, ids, ids * 0), rtol=0, atol=1e-5)


def test_a_student_learns_from_answers_alone(taught, tmp_path):
    """Its labels are the wrong ones, and count for nothing."""
    lines = [json.loads(json.dumps(row)) for row in rows_of("classify")]
    for row in lines:
        row["label"] = {"place": "money", "money": "place"}[row["label"]]
    wrong = write_rows(tmp_path / "wrong.jsonl", lines)
    report = run(taught(train=wrong, teacher_share=1.0, epochs=12, state_loss=0.0))
    assert report.test["accuracy"] == 1
    assert run(taught(train=wrong, teacher_share=0.0, epochs=12, state_loss=0.0)).test["accuracy"] <= 0.5


def loss_of(config, epoch, output, hard, states):
    backbone = read_backbone(config.backbone)
    teacher = TaskTeacher.load(config, backbone, ("money", "place"))
    loss = TaskLoss.of(config, teacher, backbone.config.num_layers)
    ids = torch.tensor([5, 9, 11, 6])
    taught_states, wanted = teacher(batch_of(ids))
    traced = Traced([output], states(taught_states), {})
    return loss(batch_of(ids), traced, torch.tensor(hard), epoch, 1.0), taught_states, wanted


def test_the_loss_is_the_weighted_sum_of_its_parts(taught):
    config = taught(teacher_share=0.3, temperature=2.0, state_loss=0.7, state_epochs=1)
    output = torch.tensor([[0.5, -1.0]])

    def off(states):
        return {2: states[2] + 0.1}

    got, states, wanted = loss_of(config, 1, output, 2.0, off)
    distance = relative_error(states[2][0] + 0.1, states[2][0])
    soft = -((wanted / 2).softmax(1) * (output / 2).log_softmax(1)).sum() * 4
    torch.testing.assert_close(got, 0.7 * distance + 0.7 * 2.0 + 0.3 * soft)
    first, *_ = loss_of(config, 0, output, 2.0, off)
    torch.testing.assert_close(first, distance)


def test_only_states_that_something_trains_are_compared(tmp_path):
    backbone = read_backbone(tiny_backbone("bert", tmp_path, num_layers=4))
    config = TrainConfig(backbone=str(tmp_path), out="none", top_layers=1, exits=(1,))
    model = build_model(config, backbone, ("money", "place"))
    ids = torch.tensor([[5, 9, 6]])
    batch = PaddedBatch(mask=ids > 0, token_ids=ids, type_ids=ids * 0)
    traced = model.traced(batch, with_scores=True)
    assert len(traced.outputs) == 2
    assert {*traced.states} == {4}
    assert {*traced.scores} == {3}
    assert traced.states[4].requires_grad
    assert traced.scores[3].requires_grad
    assert not model.traced(batch).scores


def test_the_loss_compares_attention_before_the_softmax(taught):
    """A student without deltas attends as its backbone does, which the teacher's layers below its deltas do too."""
    config = taught(attention_loss=0.5, state_loss=0.0, teacher_share=0.0, state_epochs=1, teacher_attentions=(0, 0))
    backbone = read_backbone(config.backbone)
    teacher = TaskTeacher.load(config, backbone, ("money", "place"))
    loss = TaskLoss.of(config, teacher, backbone.config.num_layers)
    ids = torch.tensor([[5, 9, 11, 6], [7, 8, 0, 0]])
    batch = Batch(ids, ids * 0, ids > 0)
    states, _ = teacher(batch)
    scores = teacher.encoder.layers[0].scores(states[0])
    pairs = (batch.mask[:, None, :, None] & batch.mask[:, None, None, :]).expand_as(scores)
    off = torch.where(pairs, scores + 0.3, 1e6)  # what no text has is not compared
    output = torch.zeros(2, 2)
    traced = Traced([output], {}, {1: off})
    want = 0.3**2 / scores[pairs].var()
    torch.testing.assert_close(loss(batch, traced, torch.tensor(2.0), 0, 1.0), 0.5 * want)
    torch.testing.assert_close(loss(batch, traced, torch.tensor(2.0), 1, 1.0), 0.5 * want + 2.0)
    model = build_model(replace(config, teacher=""), backbone, ("money", "place")).eval()
    own = model.traced(PaddedBatch(mask=batch.mask, token_ids=ids, type_ids=ids * 0), with_scores=True).scores[0]
    plain = Teacher(backbone)  # new deltas change nothing
    want = plain.layers[0].scores(plain(batch)[0])
    torch.testing.assert_close(own[pairs], want[pairs], rtol=0, atol=1e-5)


def test_a_student_comes_nearer_to_its_teachers_attention(taught):
    def apart(**settings):
        config = taught(epochs=6, state_loss=0.0, **settings)
        run(config)
        backbone, module = read_backbone(config.backbone), read_tenant_bytes(Path(config.out).read_bytes())
        batch = batch_of(torch.tensor([5, 9, 11, 6]))
        teacher, own = (TaskTeacher(backbone, each).encoder for each in (_teacher_of(config), module))
        layer = backbone.config.num_layers - 1
        scores = [each.layers[layer].scores(each(batch)[layer]) for each in (own, teacher)]
        return float(score_error(*scores, batch.mask))

    assert apart(attention_loss=5.0) < 0.5 * apart()


def _teacher_of(config):
    return read_tenant_bytes(Path(config.teacher).read_bytes())


@pytest.mark.parametrize("plain_way", [True, False])
def test_a_tenant_that_skips_learns_from_one_that_does_not(tmp_path, plain_way):
    """On one backbone with both ways, or on two; the student's layers are compared with some of the teacher's."""
    source = read_backbone(tiny_backbone("bert", tmp_path / "plain", num_layers=3, positions=66))
    write_folder(tmp_path / "skip", random_student(source), source, plain_way=plain_way, name="tiny-skip")
    rows = write_rows(tmp_path / "rows.jsonl", rows_of("classify"))
    small = {"train": rows, "dev": rows, "rank": 2, "epochs": 3, "batch_size": 6, "lr": 0.01, "head_lr": 0.05}
    teacher = tmp_path / "teacher.safetensors"
    run(TrainConfig(backbone=str(source.folder), out=str(teacher), **small))
    paths = ("plain", "exact", "backoff") if plain_way else ("exact", "backoff")
    where = {} if plain_way else {"teacher_backbone": str(source.folder), "teacher_states": (2, 3)}
    student = read_backbone(tmp_path / "skip")
    if not plain_way and student.config.num_layers != 2:
        where["teacher_states"] = tuple(range(4 - student.config.num_layers, 4))
    out = tmp_path / "student.safetensors"
    report = run(
        TrainConfig(
            backbone=str(student.folder),
            out=str(out),
            teacher=str(teacher),
            state_loss=0.5,
            paths=paths,
            **where,
            **small,
        )
    )
    module = read_tenant_bytes(out.read_bytes())
    assert module.paths == paths
    assert set(report.by_path) == set(paths)
    for test in module.self_tests:
        want = dense_forward(student, module, test.token_ids, test.type_ids, test.path)
        torch.testing.assert_close(test.expected, want, rtol=0, atol=1e-4)


def test_each_path_gets_the_steps_that_it_would_get_alone(tmp_path, monkeypatch):
    source = read_backbone(tiny_backbone("bert", tmp_path / "plain", num_layers=3, positions=66))
    write_folder(tmp_path / "skip", random_student(source), source, plain_way=True, name="tiny-skip")
    rows = write_rows(tmp_path / "rows.jsonl", rows_of("classify"))
    steps, taken, loss_of_step = [], Counter(), loop._loss_of_step

    def counted(model, train, indices, path, *others):
        taken[path] += 1
        return loss_of_step(model, train, indices, path, *others)

    monkeypatch.setattr(loop, "_loss_of_step", counted)
    for paths in (("exact",), ("plain", "exact", "backoff")):
        told = []
        config = TrainConfig(
            backbone=str(tmp_path / "skip"),
            out=str(tmp_path / f"{len(paths)}.safetensors"),
            train=rows,
            dev=rows,
            rank=2,
            epochs=2,
            batch_size=2,
            paths=paths,
        )
        run(config, progress=lambda what, done, total, told=told: told.append((what, done, total)))
        training = [(done, total) for what, done, total in told if what.startswith("training: epoch")]
        steps.append(len(training))
        assert [done for done, _ in training] == list(range(1, training[0][1] + 1))
    assert steps[1] == 3 * steps[0]
    assert taken == Counter(dict.fromkeys(("plain", "exact", "backoff"), steps[0])) + Counter(exact=steps[0])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"state_epochs": 2}, "give fewer"),
        ({"method": "head", "state_epochs": 1}, "a head alone"),
        ({"teacher_share": 1.5}, "from 0 to 1"),
        ({"attention_loss": 1.0, "teacher_attentions": (1,)}, "give 2 layers"),
        ({"attention_loss": 1.0, "teacher_attentions": (0, 2)}, "0 to 1"),
        ({"teacher_states": (1,)}, "give 2 states"),
        ({"teacher_states": (1, 9)}, "up to 2"),
        ({"teacher_states": (-1, 2)}, "count from 0"),
    ],
)
def test_a_lesson_that_cannot_be_is_refused(taught, settings, says):
    with pytest.raises(ConfigError, match=says):
        run(replace(taught(), **settings))


def test_a_teacher_of_another_kind_is_refused(taught, make_config, tmp_path):
    adapter = tmp_path / "adapter.safetensors"
    run(replace(make_config("classify", method="bottleneck"), out=str(adapter)))
    with pytest.raises(ConfigError, match="adapters between layers"):
        run(taught(teacher=str(adapter)))
    other = tiny_backbone("bert", tmp_path / "other", hidden=48)
    with pytest.raises(ConfigError, match="and width 32, the student's"):
        run(taught(backbone=str(other), teacher_backbone=taught().backbone))
    with pytest.raises(ConfigError, match="is no tenant of"):
        run(taught(backbone=str(other)))
    rows = [row | {"label": f"{row['label']}!"} for row in rows_of("classify")]
    named = write_rows(tmp_path / "named.jsonl", rows)
    with pytest.raises(ConfigError, match="other labels"):
        run(taught(train=named, dev=named, test=named))
    with pytest.raises(ConfigError, match="not regression"):
        run(make_config("regression", teacher=taught().teacher))
