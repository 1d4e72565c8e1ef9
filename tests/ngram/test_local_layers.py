"""Local layers as served against the training module, which shares no code with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import tiny_backbone
from training.export_skip import write_folder
from training.skip_student import Batch, SkipShape, SkipStudent, Teacher
from vbert.encoder import Encoder
from vbert.entry import Entry, Tokens
from vbert.errors import CorruptFile
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.local_layers import LocalLayers
from vbert.ngram.views import add_views

CPU = torch.device("cpu")


def random_student(backbone: Backbone, kind: str = "trigram", lower: int = 2, seed: int = 0) -> SkipStudent:
    """All its parameters random, so that a forgotten one shows."""
    torch.manual_seed(seed)
    sinks = torch.randn(2, 2, backbone.config.hidden_size)
    last = backbone.config.num_layers - 1
    student = SkipStudent(backbone, SkipShape(kind=kind, skipped=1, lower=lower, upper=(last,)), sinks)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if not name.startswith(("upper", "lower.word")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return student.eval()


def batch_of(lengths: list[int], vocab_size: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, min(vocab_size, 12), (len(lengths), max(lengths))))
    types = torch.from_numpy(rng.integers(0, 2, ids.shape))
    return Batch(ids, types, torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None])


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("plain_way", [True, False])
@pytest.mark.parametrize(("kind", "lower"), [("trigram", 2), ("trigram", 1), ("unigram", 1), ("unigram", 0)])
def test_a_folder_computes_what_the_student_computed(
    model_type: str, plain_way: bool, kind: str, lower: int, tmp_path: Path
) -> None:
    source = read_backbone(tiny_backbone(model_type, tmp_path / "plain"))
    student = random_student(source, kind, lower)
    fingerprint = write_folder(tmp_path / "skip", student, source, plain_way=plain_way, name="tiny")
    backbone = read_backbone(tmp_path / "skip")
    skip = backbone.skip
    assert skip is not None
    assert skip.fingerprint == skip.base == fingerprint
    assert (backbone.fingerprint == source.fingerprint) == plain_way
    assert skip.config.first_layer == (1 if plain_way else 0)

    local = LocalLayers(Encoder(backbone.config, backbone.weights, torch.float32, CPU), skip)
    batch = batch_of([5, 1, 9, 2], source.config.vocab_size)
    texts = [
        [row[mask].tolist() for row, mask in zip(ids, batch.mask, strict=True)]
        for ids in (batch.token_ids, batch.type_ids)
    ]
    tokens = Tokens.of(*texts, skip.config)
    with torch.no_grad():
        expected = student(batch)[0][batch.mask]
    entered, computed = local.enter(Entry.computed(tokens))
    torch.testing.assert_close(entered, expected, atol=1e-5, rtol=1e-5)

    # every other n-gram is stored
    distinct, which = np.unique(tokens.keys, return_inverse=True)
    there = np.arange(len(distinct)) % 2 == 0
    stored = torch.zeros(len(tokens), source.config.hidden_size)
    add_views(computed, np.where(there[which], which, -1), tokens.cu_seqlens, out=stored)
    missing = np.cumsum(~there) - 1
    entry = Entry(tokens, stored, distinct[~there], np.where(there[which], -1, missing[which]))
    torch.testing.assert_close(local.enter(entry)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", ["exact", "backoff"])
@pytest.mark.parametrize("plain_way", [True, False])
@pytest.mark.parametrize("kind", ["trigram", "unigram"])
def test_the_reference_computes_what_the_student_computed(
    kind: str, plain_way: bool, path: str, tmp_path: Path
) -> None:
    from vbert.reference import dense_hidden

    source = read_backbone(tiny_backbone("roberta", tmp_path / "plain"))
    student = random_student(source, kind)
    write_folder(tmp_path / "skip", student, source, plain_way=plain_way, name="tiny")
    batch = batch_of([8], source.config.vocab_size)
    with torch.no_grad():
        expected = student(batch, kept=torch.tensor([[3, 2, 1, 3, 2, 1, 3, 2]]) if path == "backoff" else None)[-1][0]
    skipped = dense_hidden(read_backbone(tmp_path / "skip"), None, batch.token_ids[0], batch.type_ids[0], path)
    torch.testing.assert_close(skipped, expected, atol=1e-5, rtol=1e-5)


def test_the_teacher_is_the_plain_encoder(tmp_path: Path) -> None:
    from vbert.reference import dense_hidden

    source = read_backbone(tiny_backbone("bert", tmp_path))
    batch = batch_of([7], source.config.vocab_size)
    with torch.no_grad():
        ours = Teacher(source)(batch)[-1][0]
    torch.testing.assert_close(ours, dense_hidden(source, None, batch.token_ids[0], batch.type_ids[0]))


def test_a_folder_is_refused_whose_parts_do_not_belong_together(tmp_path: Path) -> None:
    source = read_backbone(tiny_backbone("bert", tmp_path / "plain"))
    for name, seed in (("one", 0), ("two", 1)):
        write_folder(tmp_path / name, random_student(source, seed=seed), source, plain_way=False, name="tiny")
    (tmp_path / "two" / "skip.safetensors").replace(tmp_path / "one" / "skip.safetensors")
    with pytest.raises(CorruptFile, match="written for other weights"):
        read_backbone(tmp_path / "one")
    (tmp_path / "one" / "skip.json").unlink()
    with pytest.raises(CorruptFile, match="only upper layers"):
        read_backbone(tmp_path / "one")
