"""Tiny seeded backbones of every model type, as ordinary `transformers` folders, with real tokenizers.

`tiny_backbone("roberta", folder)` writes 2 layers x 32 in a few milliseconds. All parameters are random, biases and
LayerNorms too, and large enough that a wrong residual or a forgotten bias shows in the third digit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors

from vbert.config import MODEL_TYPES

TEXTS = (
    "the cat sat on the mat",
    "please transfer 20 euros to my savings account",
    "Where is the nearest station?",
    "no",
    "élan vital, naïve café",
    "a very long sentence with many words that goes on and on about nothing at all",
    "book a table for two at the new place in town tomorrow evening",
)
PAIRS = (("how are you", "fine, thanks"), ("the cat sat", "a cat was sitting on the mat"), ("yes", "no"))

_WORDS = sorted({word.lower() for text in TEXTS for word in text.replace(",", " ").replace("?", " ").split()})
_PIECES = [*"abcdefghijklmnopqrstuvwxyz0123456789,.?!éï", *_WORDS, "##s", "##ing", "##ed", "##er", "##tion"]
_PIECES += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]


def tiny_backbone(model_type: str, folder: Path, *, seed: int = 0, pooler: bool = True, **config: Any) -> Path:
    """Write a 2-layer, 32-wide, 4-head random encoder of this type to `folder` and return it."""
    from transformers import AutoModel

    torch_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModel.from_config(tiny_config(model_type, **config))
    if not pooler and getattr(model, "pooler", None) is not None:
        model.pooler = None
    randomise_(model)
    model.save_pretrained(folder)
    tiny_tokenizer(model_type, folder)
    torch.set_rng_state(torch_state)
    return folder


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The `transformers` config of a tiny encoder. `num_layers`, `hidden`, `heads`, `ffn`, `positions` may differ."""
    from transformers import AutoConfig

    size = {"num_layers": 2, "hidden": 32, "heads": 4, "ffn": 64, "positions": 66} | changes
    distilbert = model_type == "distilbert"
    fields = {
        "n_layers" if distilbert else "num_hidden_layers": size.pop("num_layers"),
        "dim" if distilbert else "hidden_size": size.pop("hidden"),
        "n_heads" if distilbert else "num_attention_heads": size.pop("heads"),
        "hidden_dim" if distilbert else "intermediate_size": size.pop("ffn"),
        "max_position_embeddings": size.pop("positions"),
        "vocab_size": 300,
        "pad_token_id": 0 if model_type in ("bert", "distilbert") else 1,
    }
    if model_type in ("roberta", "xlm-roberta"):
        fields["type_vocab_size"] = 1
    return AutoConfig.for_model(model_type, **(fields | size))


def randomise_(model: torch.nn.Module) -> None:
    """Random numbers in every parameter, in the order of its name, from torch's generator."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name.lower():
                parameter.normal_(0.0, 0.1).add_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.normal_(0.0, 0.05 if name.endswith("bias") else 0.15)


def tiny_tokenizer(model_type: str, folder: Path) -> None:
    """WordPiece (bert, distilbert, mpnet), byte-level BPE (roberta) or Unigram (xlm-roberta) into `folder`."""
    names = (
        ("[CLS]", "[PAD]", "[SEP]", "[UNK]")
        if model_type in ("bert", "distilbert")
        else ("<s>", "<pad>", "</s>", "<unk>")
    )
    cls, pad, sep, unk = names
    specials = [pad, unk, cls, sep] if pad == "[PAD]" else [cls, pad, sep, unk]
    tokenizer = {"roberta": _byte_level, "xlm-roberta": _unigram}.get(model_type, _word_piece)(specials, unk)
    tokenizer.add_special_tokens(specials)
    ids = [(token, tokenizer.token_to_id(token)) for token in (cls, sep)]
    if pad == "[PAD]":
        tokenizer.post_processor = processors.BertProcessing((sep, ids[1][1]), (cls, ids[0][1]))
    else:
        trim = {"trim_offsets": True, "add_prefix_space": False}
        tokenizer.post_processor = processors.RobertaProcessing((sep, ids[1][1]), (cls, ids[0][1]), **trim)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    options |= {"cls_token": cls, "pad_token": pad, "sep_token": sep, "unk_token": unk}
    types = ["token_type_ids"] if model_type == "bert" else []
    options["model_input_names"] = ["input_ids", *types, "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


def _word_piece(specials: list[str], unk: str) -> tokenizers.Tokenizer:
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*specials, *_PIECES]))}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unk))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _byte_level(specials: list[str], unk: str) -> tokenizers.Tokenizer:
    pieces = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "Ġth", "Ġthe", "at", "in", "on"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("a", "t"), ("i", "n"), ("o", "n")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _unigram(specials: list[str], unk: str) -> tokenizers.Tokenizer:
    pieces = dict.fromkeys([*specials, "▁", *(p.removeprefix("##") for p in _PIECES), *(f"▁{w}" for w in _WORDS)])
    scored = [(piece, -float(i) / 20 - 1) for i, piece in enumerate(pieces)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(scored, unk_id=specials.index(unk)))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def main() -> None:
    import sys

    for model_type in MODEL_TYPES:
        print(tiny_backbone(model_type, Path(sys.argv[1]) / model_type))


if __name__ == "__main__":
    main()
