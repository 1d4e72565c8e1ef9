"""Unlabelled text for distillation: files of lines or JSON objects, tokenised once, in batches of similar lengths."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from training.progress import Progress, silent
from training.skip_student import Batch
from vbert.errors import BadRequest
from vbert.tokenizer import Input, Tokenizer

__all__ = ["Texts", "draw", "read_texts"]

_AT_ONCE = 4096  # texts tokenised in one call
_POOL_BATCHES = 32  # batches that are drawn together and then cut by length


def read_texts(path: Path | str, told: Callable[[int], None] = lambda num_bytes: None) -> Iterator[Input]:
    """Each line of FILE.txt[.gz], or the text of each object of FILE.jsonl[.gz]: "text", a pair with "text_b", or
    "tokens". told: now and then, how many bytes of the file were read. Raises BadRequest naming the file, and the line
    where it is one."""
    path = Path(path)
    try:
        with path.open("rb") as raw, _as_text(raw, path) as file:
            for number, line in enumerate(file, 1):
                if number % _AT_ONCE == 0 and raw.seekable():
                    told(raw.tell())
                if line.strip():
                    yield line.strip() if ".jsonl" not in path.name else _text_of(line, f"{path} line {number}")
    except FileNotFoundError:
        raise BadRequest(f"{path} does not exist; give a .txt or .jsonl file, or one of these with .gz") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} cannot be read ({error}); save it again as UTF-8") from None


def _as_text(raw: BinaryIO, path: Path) -> IO[str]:
    return gzip.open(raw, "rt", encoding="utf-8") if path.suffix == ".gz" else io.TextIOWrapper(raw, encoding="utf-8")


def _text_of(line: str, where: str) -> Input:
    try:
        value = json.loads(line)
        if "tokens" in value:
            return " ".join(value["tokens"])
        text = value["text"]
        found = (text, value["text_b"]) if "text_b" in value else text
        if not all(isinstance(part, str) and part.strip() for part in ([text] if found is text else found)):
            raise TypeError("no text")
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise BadRequest(f'{where}: {error!r}; give an object with "text" or "tokens"') from None
    return found


class Texts:
    """Token sequences one after the other. ids, types: [T] int32; starts: [N + 1]."""

    def __init__(self, ids: NDArray[np.int32], types: NDArray[np.int32], starts: NDArray[np.int64]) -> None:
        self.ids, self.types, self.starts = ids, types, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @classmethod
    def tokenise(
        cls, files: Sequence[Path | str], tokenizer: Tokenizer, max_length: int, progress: Progress = silent
    ) -> Texts:
        """All texts of some files. A text longer than `max_length` is cut into pieces, each with the special tokens of
        the whole at its ends; a pair is cut at its end."""
        ids: list[list[int]] = []
        types: list[list[int]] = []
        for done, file in enumerate(files):
            progress(f"reading: {Path(file).parent.name}/{Path(file).name}", done, len(files))
            every = list(read_texts(file))
            for i in range(0, len(every), _AT_ONCE):
                chunk = every[i : i + _AT_ONCE]
                for item, encoded in zip(chunk, tokenizer.encode(chunk, offsets=False), strict=True):
                    if isinstance(item, str) and len(encoded.token_ids) > max_length:
                        first, *body, last = encoded.token_ids
                        step = max_length - 2
                        pieces = [[first, *body[j : j + step], last] for j in range(0, len(body), step)]
                    else:
                        pieces = [encoded.token_ids[:max_length]]
                    ids += pieces
                    types += [encoded.type_ids[: len(piece)] for piece in pieces]
        progress("reading: done", len(files), len(files))
        if not ids:
            raise BadRequest(f"{', '.join(map(str, files))}: no text at all; give files that have some")
        starts = np.concatenate([[0], np.cumsum([len(piece) for piece in ids])]).astype(np.int64)
        flat, flat_types = (
            np.fromiter((i for piece in part for i in piece), np.int32, starts[-1]) for part in (ids, types)
        )
        return cls(flat, flat_types, starts)

    def split(self, count: int, seed: int) -> tuple[Texts, Texts]:
        """All but `count` texts, and these, drawn at random; at most a tenth, but one, is taken out. Raises BadRequest
        for a single text."""
        if len(self) < 2:
            raise BadRequest("there is one text only, and some are held out to be measured; give more")
        order = np.random.default_rng(seed).permutation(len(self))
        cut = min(count, max(1, len(self) // 10))
        return self._only(np.sort(order[cut:])), self._only(np.sort(order[:cut]))

    def _only(self, chosen: NDArray[np.int64]) -> Texts:
        lengths = np.diff(self.starts)[chosen]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        at = np.repeat(self.starts[chosen] - starts[:-1], lengths) + np.arange(starts[-1])
        return Texts(self.ids[at], self.types[at], starts)

    def batch(self, indices: NDArray[np.int64], device: torch.device) -> Batch:
        lengths = self.starts[indices + 1] - self.starts[indices]
        at = np.arange(int(lengths.max()))[None, :]
        real = at < lengths[:, None]
        places = np.where(real, self.starts[indices][:, None] + at, 0)
        ids, types = (
            torch.from_numpy(np.where(real, part[places], 0).astype(np.int64)) for part in (self.ids, self.types)
        )
        return Batch(ids.to(device), types.to(device), torch.from_numpy(real).to(device))


def draw(parts: Sequence[Texts], batch_size: int, seed: int) -> Iterator[tuple[Texts, NDArray[np.int64]]]:
    """Batches without end, from each part in turn; a part that is used up begins again in another order."""
    streams = [_batches(part, batch_size, seed + 1000 * i) for i, part in enumerate(parts)]
    while True:
        for part, stream in zip(parts, streams, strict=True):
            yield part, next(stream)


def _batches(part: Texts, batch_size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    lengths, rng = np.diff(part.starts), np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(part))
        for i in range(0, len(order), batch_size * _POOL_BATCHES):
            pool = order[i : i + batch_size * _POOL_BATCHES]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            cut = [pool[j : j + batch_size] for j in range(0, len(pool), batch_size)]
            for k in rng.permutation(len(cut)):
                yield cut[k]
