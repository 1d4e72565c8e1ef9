"""Distillation: what is written is what was trained, it learns, and a run that was cut ends as one that was not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

import training.distill_lower_layers as distill
from tests.tiny import TEXTS, tiny_backbone
from training.build import build_model
from training.config import TrainConfig, read_recipe
from training.distill_config import DistillConfig
from training.export_skip import read_window
from training.model import PaddedBatch
from training.skip_student import SkipStudent, hashed_kept, random_kept, read_lower
from training.texts import Texts, draw, read_texts
from vbert.errors import BadRequest, ConfigError, WrongBackbone
from vbert.formats.transformers_folder import read_backbone
from vbert.reference import dense_forward, dense_hidden
from vbert.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tiny_backbone("bert", tmp_path_factory.mktemp("plain"), num_layers=4)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["[MASK]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    rng = np.random.default_rng(0)
    words = " ".join(TEXTS).split()
    path = tmp_path_factory.mktemp("texts") / "corpus.txt"
    path.write_text("\n".join(" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(600)))
    return str(path)


@pytest.fixture
def config(plain, texts, tmp_path):
    settings = {"skipped": 2, "lower": 1, "tokens": 20_000, "batch_size": 32, "dtype": "float32", "lr": 3e-3}
    return DistillConfig(backbone=str(plain), texts=(texts,), out=str(tmp_path / "out"), **settings)


def total(losses):
    return sum(losses.values())


@pytest.mark.parametrize("upper_layers", ["frozen", "trained"])
def test_a_student_comes_near_its_teacher(config, upper_layers):
    report = distill.run(replace(config, upper_layers=upper_layers))
    assert total(report.after) < 0.7 * total(report.before)
    assert total(report.after_backoff) < 0.8 * total(report.before_backoff)
    backbone = read_backbone(config.out)
    assert backbone.skip.fingerprint == report.fingerprint
    assert backbone.skip.config.first_layer == (0 if upper_layers == "trained" else 2)
    told = json.loads((report.path / "distilled.json").read_text())
    assert told["settings"]["tokens"] == 20_000
    assert told["report"]["after"] == report.after


def test_a_shallower_plain_encoder_is_an_ordinary_folder(config):
    distill.run(replace(config, kind="full", upper_layers="trained", tokens=2_000))
    backbone = read_backbone(config.out)
    assert backbone.skip is None
    assert backbone.config.num_layers == 3
    assert dense_forward(backbone, None, [5, 6, 7], [0, 0, 0]).isfinite().all()


@pytest.mark.parametrize("kind", ["unigram", "window"])
def test_other_students_learn_too(config, kind):
    report = distill.run(replace(config, kind=kind, tokens=5_000))
    assert total(report.after) < total(report.before)
    assert (report.path / "skip.json").exists() == (kind == "unigram")
    assert bool(report.fingerprint) == (kind == "unigram")


def test_a_window_student_is_read_as_it_was_written(config, plain, monkeypatch, tmp_path):
    students, write = [], distill.write_window
    monkeypatch.setattr(distill, "write_window", lambda *args: (students.append(args[1]), write(*args)))
    report = distill.run(replace(config, kind="window", window=7, tokens=2_000))
    backbone = read_backbone(plain)
    lower, first_layer = read_window(report.path, backbone)
    assert first_layer == 2
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]])
    batch = PaddedBatch(token_ids=ids, type_ids=ids * 0, mask=ids > 0, path="exact")
    want = students[0].eval().lower(batch.tokens(), None)
    assert torch.equal(lower(batch.tokens(), None), want)
    model = build_model(TrainConfig(top_layers=2, backbone=str(plain)), backbone, ("a", "b"))
    model.skip_with(lower, first_layer)
    assert torch.equal(model.frozen_rows(batch).rows, want)
    assert read_window(plain, backbone) is None
    with pytest.raises(WrongBackbone, match="learnt from backbone"):
        read_window(report.path, replace(backbone, fingerprint="sha256:other"))
    with pytest.raises(ConfigError, match="keeps the teacher's upper layers"):
        distill.run(replace(config, kind="window", upper_layers="trained", out=str(tmp_path / "other")))


def test_more_local_layers_than_upper_ones_are_adapted_too(config, tmp_path):
    base = distill.run(replace(config, skipped=3, lower=3, upper_layers="trained", tokens=1_000))
    report = distill.run(
        replace(config, objective="mlm", backbone=str(base.path), out=str(tmp_path / "d"), tokens=1_000)
    )
    assert read_backbone(report.path).skip.config.local_layers == 3


def test_places_that_were_not_trained_are_like_the_last_ones(config):
    distill.run(replace(config, tokens=2_000, max_length=16))
    positions = read_backbone(config.out).skip.weights["merge.position_embeddings"]
    assert len(positions) > 16
    torch.testing.assert_close(positions[16:], positions[:16].mean(0).expand(len(positions) - 16, -1))


def test_a_few_texts_are_enough(config, tmp_path):
    (tmp_path / "few.txt").write_text("\n".join(TEXTS[:3]))
    distill.run(replace(config, texts=(str(tmp_path / "few.txt"),), tokens=100))
    (tmp_path / "one.txt").write_text(TEXTS[3])
    with pytest.raises(BadRequest, match="one text only"):
        distill.run(replace(config, texts=(str(tmp_path / "one.txt"),), out=str(tmp_path / "y")))


def test_attention_is_compared_with_the_layers_that_are_named(config, tmp_path):
    def before(**settings):
        changes = {"tokens": 200, "attention_loss": 1.0, "upper_layers": "trained"} | settings
        out = tmp_path / str(settings)
        return distill.run(replace(config, out=str(out), **changes)).before["attention"]

    assert before() == before(attention_targets=(2, 3)) != before(attention_targets=(1, 3))


class _Cut(Exception):
    pass


def test_a_run_that_was_cut_goes_on_and_ends_as_if_it_had_not_been(config, monkeypatch, tmp_path):
    config = replace(config, tokens=4_000, attention_loss=0.5)
    whole = distill.run(replace(config, out=str(tmp_path / "whole")))
    steps = []

    def cut(what, done, total):
        if what.startswith("distilling"):
            steps.append(done)
            if done == 7:
                raise _Cut

    monkeypatch.setattr(distill.time, "perf_counter", _Clock())
    steps.clear()
    with pytest.raises(_Cut):
        distill.run(config, progress=cut)
    monkeypatch.undo()
    steps.clear()
    again = distill.run(config, progress=lambda what, done, _: steps.append(done) if "distilling" in what else None)
    assert steps[0] > 1
    assert again.fingerprint == whole.fingerprint
    assert again.before == whole.before
    with pytest.raises(ConfigError, match="finished backbone in it; delete it"):
        distill.run(config)
    config = replace(config, out=str(tmp_path / "again"))
    monkeypatch.setattr(distill.time, "perf_counter", _Clock())
    with pytest.raises(_Cut):
        distill.run(config, progress=cut)
    with pytest.raises(ConfigError, match="other settings"):
        distill.run(replace(config, lr=1e-3))


class _Clock:
    """An hour passes between two looks at it: everything that happens now and then happens always."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 3600.0
        return self.now


def test_local_layers_are_adapted_to_a_domain(config, texts, tmp_path):
    base = distill.run(replace(config, tokens=3_000))
    settings = {"objective": "mlm", "backbone": str(base.path), "out": str(tmp_path / "domain"), "tokens": 6_000}
    report = distill.run(replace(config, **settings))
    assert total(report.after) < total(report.before)
    backbone, old = read_backbone(report.path), read_backbone(base.path)
    assert backbone.skip.base == old.skip.fingerprint != backbone.skip.fingerprint
    assert backbone.fingerprint == old.fingerprint
    for name in ("merge.norm.weight", "merge.position_embeddings"):
        assert torch.equal(backbone.skip.weights[name], old.skip.weights[name])
    assert not torch.equal(backbone.skip.weights["layers.0.q.weight"], old.skip.weights["layers.0.q.weight"])
    shorter = {"max_length": config.max_length // 2, "out": str(tmp_path / "short"), "tokens": 500}
    short = read_backbone(distill.run(replace(config, **settings | shorter)).path)
    assert torch.equal(short.skip.weights["merge.position_embeddings"], old.skip.weights["merge.position_embeddings"])


def test_what_was_written_computes_what_was_trained(config):
    distill.run(replace(config, tokens=1_000))
    backbone = read_backbone(config.out)
    student, ids = SkipStudent.of(backbone), torch.tensor([[2, 9, 8, 7, 3]])
    from training.skip_student import Batch

    with torch.no_grad():
        ours = student(Batch(ids, ids * 0, ids > 0))[-1][0]
    torch.testing.assert_close(ours, dense_hidden(backbone, None, ids[0], ids[0] * 0, "exact"), atol=1e-4, rtol=1e-4)
    assert read_lower(backbone).slots == 3


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"skipped": 4}, "has 4 layers"),
        ({"upper": (3,)}, "upper_layers trained"),
        ({"upper": (2, 9), "upper_layers": "trained"}, "layers 0 to 3"),
        ({"upper": (-1, 3), "upper_layers": "trained"}, "layers 0 to 3"),
        ({"lower": 5}, "lower is 5"),
        ({"max_length": 1000}, "max_length is 1000"),
        ({"targets": (2, 3)}, "targets are"),
        ({"targets": (2, 3, 5)}, "up to 4"),
        ({"attention_targets": (1, 3), "attention_loss": 1.0}, "attend like themselves"),
        ({"attention_targets": (2,), "attention_loss": 1.0, "upper_layers": "trained"}, "give 2 ascending"),
        ({"attention_targets": (2, 4), "attention_loss": 1.0, "upper_layers": "trained"}, "up to 3"),
        ({"attention_targets": (-1, 2), "attention_loss": 1.0, "upper_layers": "trained"}, "up to 3"),
        ({"objective": "mlm"}, "no local layers"),
        ({"texts": ()}, "nothing to learn"),
        ({"out": ""}, "out is not set"),
        ({"upper": ("a",)}, "give int"),
        ({"backoff_share": 1.5}, "up to 1"),
    ],
)
def test_settings_that_cannot_be(config, changes, match):
    with pytest.raises(ConfigError, match=match):
        distill.run(replace(config, **changes))


# ---- texts -------------------------------------------------------------------------------------------------------


def test_long_texts_are_cut_into_pieces_with_their_special_tokens(plain, tmp_path):
    backbone = read_backbone(plain)
    tokenizer = Tokenizer.load(plain, backbone.config)
    (tmp_path / "t.txt").write_text(f"{TEXTS[5]}\n\nno\n")
    (whole,) = tokenizer.encode([TEXTS[5]], offsets=False)
    texts = Texts.tokenise([tmp_path / "t.txt"], tokenizer, 16)
    pieces = [texts.ids[a:b].tolist() for a, b in zip(texts.starts, texts.starts[1:], strict=False)]
    first, *body, last = whole.token_ids
    assert all(piece[0] == first and piece[-1] == last and len(piece) <= 16 for piece in pieces)
    assert [token for piece in pieces[:-1] for token in piece[1:-1]] == body
    kept, held = texts.split(1, 0)
    assert len(kept) + len(held) == len(texts)


def test_every_text_comes_once_before_any_comes_again(plain, texts):
    backbone = read_backbone(plain)
    part = Texts.tokenise([texts], Tokenizer.load(plain, backbone.config), 64)
    batches = draw([part], 32, 0)
    seen = [i for _ in range(-(-len(part) // 32)) for i in next(batches)[1].tolist()]
    assert sorted(seen) == list(range(len(part)))
    batch = part.batch(np.array([0, 1, 2]), torch.device("cpu"))
    assert batch.token_ids[1, : batch.mask[1].sum()].tolist() == part.ids[part.starts[1] : part.starts[2]].tolist()


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text_b": "b"}\n{"tokens": ["c", "d"]}\n{"label": 1}\n')
    rows = read_texts(tmp_path / "a.jsonl")
    assert [next(rows), next(rows)] == [("a", "b"), "c d"]
    with pytest.raises(BadRequest, match=r"a\.jsonl line 3"):
        next(rows)
    with pytest.raises(BadRequest, match="does not exist"):
        list(read_texts(tmp_path / "b.txt"))


def test_shortening_takes_the_share_it_was_asked_for():
    from training.skip_student import Batch

    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 30_000, (64, 100)))
    batch = Batch(ids, ids * 0, torch.ones_like(ids, dtype=torch.bool))
    for kept in (hashed_kept(batch, 0.6), random_kept(ids.shape, 0.6, ids.device)):
        assert float((kept < 3).float().mean()) == pytest.approx(0.6, abs=0.03)
        assert float((kept == 1).float().mean()) == pytest.approx(0.2, abs=0.03)
    assert torch.equal(hashed_kept(batch, 0.6), hashed_kept(batch, 0.6))


@pytest.mark.parametrize("path", sorted((ROOT / "training/recipes/distill").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_of_the_shape_they_are_named_after(path):
    settings = read_recipe(path, DistillConfig)
    config = DistillConfig(**settings, backbone="x", texts=("x",), out="x", attention_loss=1.0)
    name, _, layers = path.stem.rpartition("-")
    shape = config.shape({"minilm-l6": 6, "e5-12l": 12}[name])
    kind = "" if shape.kind == "trigram" else shape.kind
    assert f"{shape.lower}{kind}+{len(shape.upper)}" == layers.removesuffix("trained")
    num_layers = {"minilm-l6": 6, "e5-12l": 12}[name]
    states, attentions = config.teacher_states(shape, num_layers), config.teacher_attentions(shape, num_layers)
    assert states[-1] == num_layers
    published = {  # of SkipBERT's release
        "6+6": ((6, 7, 8, 9, 10, 11, 12), (6, 7, 8, 9, 10, 11)),
        "6+4": ((4, 6, 8, 10, 12), (2, 5, 8, 11)),
        "6+2": (states, (4, 9)),
    }
    assert (states, attentions) == published.get(layers, (states, tuple(state - 1 for state in states[1:])))
