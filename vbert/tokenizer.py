"""Text to token ids, as `transformers` makes them for the same folder, and back to places in the text.

Owns the mapping between an input (text, pair of texts, list of words, list of token ids) and one sequence of the
encoder. A `Tokenizer` has no mutable state: any number of threads may call it, and the Rust code inside releases
the interpreter lock. It knows no limits but those it is given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers  # type: ignore[import-untyped]

from vbert.config import EncoderConfig
from vbert.errors import BadRequest, CorruptFile, RefusedCheckpoint
from vbert.formats.tensors import read_json

__all__ = ["Encoded", "Input", "Tokenizer"]

Input = str | tuple[str, str] | Sequence[str] | Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One sequence. All lists but `full_length` are one item a token, in order.

    offsets: (start, end) in Unicode code points of the text; of its word for a list of words, of its own text in a
        pair; (0, 0) for special tokens and for token ids that were given.
    word_ids: position of the word (given, or as the pre-tokenizer splits); None for special tokens.
    special: added by the tokenizer, not part of the text.
    full_length: tokens before truncation, special ones included.
    """

    token_ids: list[int]
    type_ids: list[int]
    full_length: int
    offsets: list[tuple[int, int]] = field(default_factory=list)
    word_ids: list[int | None] = field(default_factory=list)
    special: list[bool] = field(default_factory=list)


class Tokenizer:
    """`Tokenizer.load(folder, config)`, then `encode`."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, vocab_size: int, has_types: bool, truncation_side: str = "right"
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._words_backend = _for_words(backend)
        self._vocab_size = vocab_size
        self._has_types = has_types
        self._truncation_side = truncation_side
        largest_id = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
        if largest_id >= vocab_size:
            raise RefusedCheckpoint(
                f"the tokenizer makes token id {largest_id} and the backbone has embeddings for {vocab_size}; "
                "use the tokenizer the backbone was trained with"
            )

    @classmethod
    def load(cls, folder: Path | str, config: EncoderConfig) -> Tokenizer:
        """Read tokenizer.json, or build one with `transformers` from older files (vocab.txt, ...).

        Raises: RefusedCheckpoint when there is no fast tokenizer, CorruptFile.
        """
        folder = Path(folder)
        options = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        # Only BERT models are given token types by their tokenizer's model_input_names; RoBERTa's have one type.
        names = options.get("model_input_names", ["token_type_ids"])
        return cls(
            _backend(folder),
            vocab_size=config.vocab_size,
            has_types=config.model_type == "bert" and config.type_vocab_size > 1 and "token_type_ids" in names,
            truncation_side=options.get("truncation_side", "right"),
        )

    def id_of(self, token: str) -> int | None:
        """None where the vocabulary has no such token."""
        found: int | None = self._backend.token_to_id(token)
        return found

    @property
    def special_ids(self) -> set[int]:
        """Of tokens that stand for no text."""
        return {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}

    def encode(self, inputs: Sequence[Input], *, max_length: int | None = None, offsets: bool = True) -> list[Encoded]:
        """Encode each input: a text, a (text, text) tuple, a list of words or a list of token ids.

        Token ids are used as they are. Longer than `max_length` tokens: cut as transformers does with
        truncation=True (pairs: longest first). offsets=False leaves offsets, word_ids and special empty and is
        faster. Raises: BadRequest for anything else, and for an input of no tokens.
        """
        results: list[Encoded | None] = [None] * len(inputs)
        texts = [i for i, item in enumerate(inputs) if isinstance(item, str | tuple)]
        words = [i for i, item in enumerate(inputs) if not isinstance(item, str | tuple) and _is_words(item)]
        for indices, backend, is_words in ((texts, self._backend, False), (words, self._words_backend, True)):
            if not indices:
                continue
            batch = [inputs[i] for i in indices]
            for item in batch:
                _check_text(item)
            run = backend.encode_batch if offsets else backend.encode_batch_fast
            for i, encoding in zip(indices, run(batch, is_pretokenized=is_words), strict=True):
                results[i] = self._encoded(encoding, max_length, offsets)
        return [
            self._from_ids(inputs[i], max_length, offsets) if done is None else done for i, done in enumerate(results)
        ]

    def _encoded(self, encoding: tokenizers.Encoding, max_length: int | None, offsets: bool) -> Encoded:
        full_length = len(encoding)
        if not full_length:
            raise BadRequest("an input has no tokens; give a text that is not empty", param="input")
        type_ids = encoding.type_ids if self._has_types else [0] * full_length
        columns = {"token_ids": encoding.ids, "type_ids": type_ids}
        if offsets:
            special = [bool(flag) for flag in encoding.special_tokens_mask]
            columns |= {"offsets": encoding.offsets, "word_ids": encoding.word_ids, "special": special}
        if max_length is not None and full_length > max_length:
            kept = _kept(encoding.sequence_ids, max_length, self._truncation_side)
            columns = {name: [column[i] for i in kept] for name, column in columns.items()}
        return Encoded(full_length=full_length, **columns)

    def _from_ids(self, item: Any, max_length: int | None, offsets: bool) -> Encoded:
        ids = list(item)
        if not ids:
            raise BadRequest("an input has no tokens; give a text or a list that is not empty", param="input")
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < self._vocab_size:
                raise BadRequest(
                    f"token id {token_id!r} is not a whole number in 0..{self._vocab_size - 1}; send ids of this "
                    "backbone's vocabulary, or text",
                    param="input",
                )
        kept = ids[:max_length]
        extra: dict[str, Any] = {}
        if offsets:
            extra = {"offsets": [(0, 0)] * len(kept), "word_ids": [None] * len(kept), "special": [False] * len(kept)}
        return Encoded(token_ids=kept, type_ids=[0] * len(kept), full_length=len(ids), **extra)


def _backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust code raises nothing narrower
            raise CorruptFile(f"{path} is not a tokenizer ({error}); save it again") from None
    from transformers import AutoTokenizer  # seconds to import, and rarely needed

    load: Any = AutoTokenizer.from_pretrained
    try:
        built = load(folder, use_fast=True, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RefusedCheckpoint(f"{folder} has no usable tokenizer ({error}); add its tokenizer.json") from None
    if not built.is_fast:
        raise RefusedCheckpoint(f"{folder} has only a slow tokenizer; add its tokenizer.json")
    return built.backend_tokenizer


def _for_words(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for lists of words. Byte-level ones must see a space before every word, or each word
    would become the pieces it has at the start of a text (transformers demands add_prefix_space=True for that)."""
    splitter = backend.pre_tokenizer
    if not isinstance(splitter, tokenizers.pre_tokenizers.ByteLevel) or splitter.add_prefix_space:
        return backend
    spec = json.loads(backend.to_str())
    for part in (spec["pre_tokenizer"], spec["post_processor"] or {}):
        if "add_prefix_space" in part:
            part["add_prefix_space"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _is_words(item: Any) -> bool:
    return isinstance(item, Sequence) and len(item) > 0 and isinstance(item[0], str)


def _check_text(item: Any) -> None:
    """Raise for what the Rust code would call a bare TypeError: wrong types, and half of a surrogate pair."""
    if isinstance(item, tuple) and len(item) != 2:
        raise BadRequest(f"a pair holds 2 texts, this one {len(item)}; send [first, second]", param="input")
    for text in (item,) if isinstance(item, str) else item:
        if not isinstance(text, str):
            raise BadRequest(f"{text!r} stands where a text belongs; send strings only", param="input")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise BadRequest(
                    "an input is not valid Unicode (a lone surrogate); send UTF-8", param="input"
                ) from None


def _kept(sequence_ids: list[int | None], max_length: int, side: str) -> list[int]:
    """Positions that stay when a too long sequence is cut: all special tokens, and of each text its first tokens (its
    last ones for side `left`). Cutting afterwards needs no state; the Rust truncation is a setting of the whole
    tokenizer, which other threads would see."""
    texts = [[i for i, text in enumerate(sequence_ids) if text == t] for t in (0, 1) if t in sequence_ids]
    special = [i for i, text in enumerate(sequence_ids) if text is None]
    room = max_length - len(special)
    if room < 0:
        raise BadRequest(f"max_length {max_length} has no room for the special tokens; raise it", param="truncate")
    lengths = _lengths([len(text) for text in texts], room)
    for text, length in zip(texts, lengths, strict=True):
        special += text[:length] if side == "right" else text[len(text) - length :]
    return sorted(special)


def _lengths(lengths: list[int], room: int) -> list[int]:
    """Tokens each part keeps: the longer of a pair is cut first, as the Rust strategy longest_first does."""
    if len(lengths) == 1:
        return [room]
    short, long = sorted(lengths)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    return [short, long] if lengths[0] <= lengths[1] else [long, short]
