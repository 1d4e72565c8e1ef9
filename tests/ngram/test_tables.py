"""Tables made of a corpus: what is counted is kept, what is kept is what the local layers give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ngram.test_local_layers import CPU, random_student
from tests.tiny import TEXTS, tiny_backbone
from training.export_skip import write_folder
from vbert.encoder import Encoder
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.local_layers import LocalLayers
from vbert.ngram.counting import NgramCounts, num_tokens
from vbert.ngram.table import NgramTable
from vbert.tables import build_table, count_texts, coverage_of, entries_in, merge_tables, prune_table
from vbert.tokenizer import Tokenizer


class Made:
    """A skip backbone, and tables of texts."""

    def __init__(self, folder: Path, kind: str = "trigram") -> None:
        source = read_backbone(tiny_backbone("bert", folder / "plain"))
        write_folder(folder / "skip", random_student(source, kind, 1), source, plain_way=True, name="tiny")
        self.folder = folder
        self.backbone: Backbone = read_backbone(folder / "skip")
        assert self.backbone.skip is not None
        encoder = Encoder(self.backbone.config, self.backbone.weights, torch.float32, CPU)
        self.local = LocalLayers(encoder, self.backbone.skip)
        self.tokenizer = Tokenizer.load(self.backbone.folder, self.backbone.config)

    def table(self, name: str, texts: list[str], **keep: object) -> NgramTable:
        counts = NgramCounts()
        assert count_texts(texts, self.tokenizer, counts) == len(texts)
        build_table(self.folder / name, self.local, counts, **({"min_count": 1} | keep))  # type: ignore[arg-type]
        return NgramTable(self.folder / name, self.local.base)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_every_row_is_what_the_local_layers_give(made: Made) -> None:
    table = made.table("t", list(TEXTS))
    out = torch.empty(len(table), 3, table.width)
    table.gather(np.arange(len(table)), out)
    torch.testing.assert_close(out, made.local.encode(table.keys), atol=2e-3, rtol=2e-3)
    assert {*num_tokens(table.keys).tolist()} == {1, 2, 3}
    assert (np.diff(table.counts.numpy().astype(np.int64)) <= 0).all()
    assert table.about["encoder"] == made.local.fingerprint
    found = coverage_of(table, TEXTS, made.tokenizer)
    assert (found.tri, found.bi, found.uni) == (1.0, 0.0, 0.0)
    assert coverage_of(table, ["savings station cat"], made.tokenizer).tri < 1


def test_a_long_text_is_counted_to_its_end(made: Made) -> None:
    """Longer than the backbone reads; n-grams know nothing of that."""
    table = made.table("t", [" ".join(["savings"] * 500) + " account station"])
    assert coverage_of(table, ["account station"], made.tokenizer).bi > 0
    (keys,) = [table.keys[table.counts.numpy() > 400]]
    assert len(keys)


def test_a_table_of_single_tokens_has_no_others(tmp_path: Path) -> None:
    table = Made(tmp_path, "unigram").table("t", list(TEXTS))
    assert {*num_tokens(table.keys).tolist()} == {1}


def test_a_size_is_kept_to(made: Made) -> None:
    for dtype in ("float16", "int8"):
        table = made.table("t", list(TEXTS), max_bytes=20_000, dtype=dtype)
        assert 10_000 < table.num_bytes <= 20_000 + 4096  # the header
        assert len(table) == entries_in(20_000, table.width, table.dtype)
    with pytest.raises(ConfigError, match="max_bytes is 10"):
        made.table("t", list(TEXTS), max_bytes=10)


def test_of_tables_that_are_merged_the_first_wins(made: Made, tmp_path: Path) -> None:
    one, other = made.table("one", list(TEXTS[:3])), made.table("other", list(TEXTS[2:]), dtype="int8")
    assert merge_tables(tmp_path / "both", [one, other]) == len(np.union1d(one.keys, other.keys))
    both = NgramTable(tmp_path / "both", made.local.base)
    assert both.dtype == torch.float16
    rows, wanted = torch.empty(len(one), 3, one.width), torch.empty(len(one), 3, one.width)
    both.gather(both.look_up(one.keys)[0], rows)
    one.gather(np.arange(len(one)), wanted)
    assert torch.equal(rows, wanted)
    shared = np.intersect1d(one.keys, other.keys)
    sums = one.counts[one.look_up(shared)[0]].long() + other.counts[other.look_up(shared)[0]].long()
    assert torch.equal(both.counts[both.look_up(shared)[0]].long(), sums)
    assert coverage_of(both, TEXTS, made.tokenizer).tri == 1.0


def test_tables_of_two_backbones_are_not_merged(made: Made, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    other = Made(tmp_path / "x", "unigram").table("t", list(TEXTS))
    with pytest.raises(ConfigError, match="merge tables of one backbone"):
        merge_tables(tmp_path / "both", [made.table("t", list(TEXTS)), other])


def test_rows_of_layers_adapted_to_a_domain_are_not_hidden_in_a_general_table(made: Made, tmp_path: Path) -> None:
    general = made.table("t", list(TEXTS))
    made.local.fingerprint = "sha256:adapted"
    adapted = made.table("finance", list(TEXTS))
    with pytest.raises(ConfigError, match="adapted to a domain"):
        merge_tables(tmp_path / "both", [general, adapted])
    assert not (tmp_path / "both").exists()
    assert merge_tables(tmp_path / "both", [adapted, adapted]) == len(adapted)


def test_pruning_keeps_the_most_frequent(made: Made, tmp_path: Path) -> None:
    table = made.table("t", [*TEXTS, *TEXTS[:2], *TEXTS[:1]])
    assert prune_table(tmp_path / "pruned", table, min_count=2) < len(table)
    pruned = NgramTable(tmp_path / "pruned", made.local.base)
    long = num_tokens(pruned.keys) > 1
    assert (pruned.counts.numpy()[long] >= 2).all()
    assert coverage_of(pruned, TEXTS[:2], made.tokenizer).tri == 1.0
    assert coverage_of(pruned, TEXTS[3:], made.tokenizer).tri < 1.0
    rows, wanted = torch.empty(len(pruned), 3, table.width), torch.empty(len(pruned), 3, table.width)
    pruned.gather(np.arange(len(pruned)), rows)
    table.gather(table.look_up(pruned.keys)[0], wanted)
    assert torch.equal(rows, wanted)
    assert prune_table(tmp_path / "pruned", table, dtype="int8") == len(table)  # beside its reader
    assert torch.equal(rows[0], torch.empty_like(rows[0]).copy_(rows[0]))


def test_what_was_built_is_there_whole_or_not_at_all(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    table = made.table("t", list(TEXTS[:2]))
    monkeypatch.setattr(made.local, "encode", lambda keys: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        made.table("t", list(TEXTS))
    assert len(NgramTable(table.path, made.local.base)) == len(table)
    assert [path.name for path in table.path.parent.iterdir() if path.name.endswith(".part")] == []
