"""`Tokenizer` gives what `transformers` gives for the same folder: ids, types, offsets, truncation."""

import json
import shutil

import pytest

from tests.tiny import PAIRS, TEXTS, tiny_backbone, tiny_tokenizer
from vbert.config import MODEL_TYPES
from vbert.errors import BadRequest, CorruptFile, RefusedCheckpoint
from vbert.formats.transformers_folder import read_backbone
from vbert.tokenizer import Tokenizer

WORDS = ["the", "cat", "élan", "transfer20", "euros"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {model_type: tiny_backbone(model_type, root / model_type) for model_type in MODEL_TYPES}


def both(folder, **options):
    from transformers import AutoTokenizer

    config = read_backbone(folder).config
    return Tokenizer.load(folder, config), AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("max_length", [None, 9, 8, 4])
def test_texts_and_pairs_match_transformers(folders, model_type, max_length):
    ours, theirs = both(folders[model_type])
    inputs = [*TEXTS, "", "emoji \U0001f600 and [SEP] or </s>", *PAIRS, ("", "b"), (PAIRS[1][1], "a")]
    for item, encoded in zip(inputs, ours.encode(inputs, max_length=max_length), strict=True):
        args = item if isinstance(item, tuple) else (item,)
        expected = theirs(*args, truncation=max_length is not None, max_length=max_length, return_offsets_mapping=True)
        assert encoded.token_ids == expected["input_ids"]
        assert encoded.type_ids == expected.get("token_type_ids", [0] * len(encoded.token_ids)) or model_type != "bert"
        assert encoded.offsets == expected["offset_mapping"]
        assert encoded.word_ids == expected.word_ids()
        assert encoded.full_length == len(theirs(*args)["input_ids"])
        assert all(flag == (word is None) for flag, word in zip(encoded.special, encoded.word_ids, strict=True))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_word_lists_match_transformers(folders, model_type):
    prefix = {"add_prefix_space": True} if model_type == "roberta" else {}
    ours, theirs = both(folders[model_type], **prefix)
    if prefix:
        from transformers import RobertaTokenizerFast

        theirs = RobertaTokenizerFast.from_pretrained(folders[model_type], **prefix)
    for max_length in (None, 5):
        (encoded,) = ours.encode([WORDS], max_length=max_length)
        expected = theirs(WORDS, is_split_into_words=True, truncation=max_length is not None, max_length=max_length)
        assert encoded.token_ids == expected["input_ids"]
        assert encoded.word_ids == expected.word_ids()


def test_offsets_of_byte_level_words_count_inside_the_word(folders):
    ours, _ = both(folders["roberta"])
    (encoded,) = ours.encode([["the", "mat"]])
    assert encoded.offsets[1] == (0, 3)


def test_mixed_kinds_keep_their_order_and_need_no_offsets(folders):
    ours, _ = both(folders["bert"])
    inputs = [[5, 6], TEXTS[0], ["the", "cat"], PAIRS[0], "no"]
    slow, fast = ours.encode(inputs), ours.encode(inputs, offsets=False)
    assert [e.token_ids for e in slow] == [e.token_ids for e in fast] == [ours.encode([i])[0].token_ids for i in inputs]
    assert [e.type_ids for e in slow] == [e.type_ids for e in fast]
    assert fast[1].offsets == []
    assert slow[0].token_ids == [5, 6]


def test_settings_saved_in_the_file_do_not_truncate_or_pad(folders, tmp_path):
    shutil.copytree(folders["bert"], tmp_path / "b")
    path = tmp_path / "b" / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(spec))
    ours, _ = both(tmp_path / "b")
    assert len(ours.encode([TEXTS[0]])[0].token_ids) == 8


def test_a_folder_with_only_a_vocabulary_is_read_through_transformers(folders, tmp_path):
    shutil.copytree(folders["bert"], tmp_path / "b")
    vocab = json.loads((tmp_path / "b" / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "b" / "tokenizer.json").unlink()
    (tmp_path / "b" / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.get)), encoding="utf-8")
    (tmp_path / "b" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    ours, _ = both(tmp_path / "b")
    reference, _ = both(folders["bert"])
    assert ours.encode([TEXTS[0]])[0].token_ids == reference.encode([TEXTS[0]])[0].token_ids


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [-1],
        [300],
        [True],
        [1, "a"],
        ["a", 1],
        [1.5],
        [[1]],
        "\ud800",
        ("a", "\ud800"),
        ("a",),
        ("a", "b", "c"),
        ("a", 1),
    ],
    ids=repr,
)
def test_bad_input_is_refused_with_its_value(folders, bad):
    ours, _ = both(folders["bert"])
    with pytest.raises(BadRequest):
        ours.encode(["fine", bad])


def test_more_special_tokens_than_room_is_refused(folders):
    ours, _ = both(folders["bert"])
    with pytest.raises(BadRequest, match="max_length 1 "):
        ours.encode(["the cat"], max_length=1)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folders):
    config = read_backbone(folders["bert"]).config
    import dataclasses

    with pytest.raises(RefusedCheckpoint, match="embeddings for 10"):
        Tokenizer.load(folders["bert"], dataclasses.replace(config, vocab_size=10))


def test_broken_or_missing_tokenizer_files(folders, tmp_path):
    config = read_backbone(folders["bert"]).config
    tiny_tokenizer("bert", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptFile, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path, config)
    with pytest.raises(RefusedCheckpoint, match="usable tokenizer"):
        Tokenizer.load(tmp_path / "nowhere", config)
