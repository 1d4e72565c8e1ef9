"""A mapped table gives the very rows of the tensor it was made from, or is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.tiny import tiny_backbone
from vbert.batch import PackedRows
from vbert.config import EncoderConfig
from vbert.errors import CorruptFile, ShapeError, WrongBackbone
from vbert.formats.transformers_folder import read_backbone
from vbert.model import Model, SequenceInput
from vbert.rows import MappedRows, publish_rows

V, H = 50, 12
IDS = [[3, 49, 0, 3], [7]]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "words.safetensors"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return read_backbone(tiny_backbone("bert", tmp_path_factory.mktemp("backbone")))


@pytest.fixture(scope="module")
def rows():
    config = EncoderConfig(
        model_type="bert",
        num_layers=1,
        hidden_size=H,
        num_heads=2,
        ffn_size=16,
        vocab_size=V,
        max_length=16,
        type_vocab_size=1,
        layer_norm_eps=1e-12,
        activation="gelu",
        pad_token_id=0,
    )
    return PackedRows.build(IDS, [[0] * len(ids) for ids in IDS], config)


def test_types_that_do_not_fit_are_no_batch():
    """More of them would be those of the next sequence."""
    for types in ([[0, 0, 0], [0]], [[0], [0, 0]]):
        with pytest.raises(ShapeError, match=r"sequences of \[2, 1\] tokens do not fit type ids of"):
            PackedRows.build([[5, 6], [7]], types, SimpleNamespace(position_offset=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gathered_rows_are_those_of_the_table(path, rows, dtype):
    table = torch.randn(V, H).to(dtype)
    publish_rows(path, table, "sha256:a")
    source = MappedRows(path, "sha256:a")
    assert (source.width, source.dtype, source.table.shape) == (H, dtype, (V, H))
    out = torch.empty(5, H, dtype=dtype)
    source.gather(rows, out)
    assert torch.equal(out, table[torch.tensor([3, 49, 0, 3, 7])])
    assert list(path.parent.iterdir()) == [path]


def test_the_table_of_another_backbone_is_refused(path):
    publish_rows(path, torch.zeros(V, H), "sha256:a")
    with pytest.raises(WrongBackbone, match="sha256:b"):
        MappedRows(path, "sha256:b")


@pytest.mark.parametrize("left", [0, 7, 8, 60, 150, -1])
def test_a_truncated_table_is_refused(path, left):
    publish_rows(path, torch.zeros(V, H), "sha256:a")
    data = path.read_bytes()
    path.write_bytes(data[:left])
    with pytest.raises(CorruptFile, match="delete it"):
        MappedRows(path, "sha256:a")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"F32"', b'"F64"'),
        (b"vbert.rows.1", b"vbert.rows.9"),
        (b"[50,12]", b"[51,12]"),
        (b"[0,2400]", b"[9,2400]"),
        (b'"rows"', b'"cows"'),
        (b"[50,12]", b'["a",1]'),
        (b'{"', b'["'),
    ],
)
def test_a_damaged_header_is_refused(path, old, new):
    publish_rows(path, torch.zeros(V, H), "sha256:a")
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(CorruptFile, match="damaged"):
        MappedRows(path, "sha256:a")


def test_a_write_that_fails_leaves_nothing(path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        publish_rows(path, torch.zeros(V, H), "sha256:a")
    assert not list(path.parent.iterdir())


def test_a_model_without_the_table_in_memory_computes_the_same(path, backbone):
    """Bit for bit, also the plain forward, which reads the file itself."""
    publish_rows(path, backbone.weights["word_embeddings"], backbone.fingerprint)
    cpu, words = torch.device("cpu"), MappedRows(path, backbone.fingerprint)
    sequences = [SequenceInput(ids, [0] * len(ids)) for ids in IDS]
    plain, mapped = Model(backbone, torch.float32, cpu), Model(backbone, torch.float32, cpu, words)
    for want, got in zip(*(model.forward(model.pack(sequences)) for model in (plain, mapped)), strict=True):
        assert torch.equal(want, got)
    with pytest.raises(ShapeError, match="bfloat16"):
        Model(backbone, torch.bfloat16, cpu, words)
