"""What a multi-tenant benchmark runs on: seeded random encoders of real shapes, and requests of real lengths.

Weights are random, so token ids may be random too; only their number matters for speed. `lengths.json` holds how many
tokens the rows of two public test sets have; `python -m benchmarks.workload --data DIR --tokenizer FOLDER` wrote it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.tiny import tiny_tokenizer

__all__ = ["ALL_SHAPES", "LENGTHS", "PETS_KINDS", "SHAPES", "Requests", "make_requests", "write_backbone"]

SHAPES = {"12x384": (12, 384, 12, 1536), "12x768": (12, 768, 12, 3072)}  # layers, hidden, heads, feed-forward
ALL_SHAPES = SHAPES | {"minilm-l6": (6, 384, 12, 1536)}
LENGTHS = ("equal", "real")
PETS_KINDS = (
    ("sparse", 50),
    ("sparse", 10),
    ("affine", 0),
    ("bottleneck", 64),
)  # MaskBert, Diff pruning, BitFit, adapters
SETS = ("clinc150", "ag_news")  # short commands and news items, half and half
EQUAL_TOKENS = 32
_CLS, _SEP, _FIRST_WORD = 101, 102, 999
_LENGTHS_FILE = Path(__file__).parent / "lengths.json"


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests that are there at once: the ids of each, and the number of the tenant that each is for."""

    token_ids: tuple[tuple[int, ...], ...]
    tenants: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))


def make_requests(num_requests: int, num_tenants: int, lengths: str, *, vocab_size: int, seed: int) -> Requests:
    """`num_requests` shuffled over `num_tenants`; lengths `equal` (32 tokens) or `real` (half of each set)."""
    rng = random.Random(seed)
    counts = [EQUAL_TOKENS] * num_requests
    if lengths == "real":
        sets = json.loads(_LENGTHS_FILE.read_text())["tokens"]
        counts = [rng.choice(sets[SETS[i % len(SETS)]]) for i in range(num_requests)]
    tenants = [i % num_tenants for i in range(num_requests)]
    rng.shuffle(tenants)
    words = [[rng.randrange(_FIRST_WORD, vocab_size) for _ in range(count - 2)] for count in counts]
    return Requests(tuple((_CLS, *ids, _SEP) for ids in words), tuple(tenants))


def write_backbone(shape: str, folder: Path, *, seed: int) -> Path:
    """A random BERT of this shape as a `transformers` folder, with a small tokenizer that the ids do not need."""
    from transformers import BertConfig, BertModel

    layers, hidden, heads, ffn = ALL_SHAPES[shape]
    config = BertConfig(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=ffn)
    torch.manual_seed(seed)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tiny_tokenizer("bert", folder)
    return folder


def record(argv: Sequence[str] | None = None) -> None:
    """Record the token counts of the test sets in lengths.json."""
    parser = argparse.ArgumentParser(description=record.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with SET/test.jsonl.gz for each set")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--rows", type=int, default=500, help="random rows of each set")
    args = parser.parse_args(argv)
    from tokenizers import Tokenizer  # type: ignore[import-untyped]

    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    tokenizer.no_padding()
    tokens = {}
    for name in SETS:
        with gzip.open(args.data / name / "test.jsonl.gz", "rt", encoding="utf-8") as file:
            texts = random.Random(0).sample([json.loads(line)["text"] for line in file], args.rows)
        tokens[name] = [min(len(encoded.ids), 512) for encoded in tokenizer.encode_batch(texts)]
    note = f"tokens, [CLS] and [SEP] included, of {args.rows} random test rows of each set; bert-base-uncased pieces"
    _LENGTHS_FILE.write_text(json.dumps({"what": note, "tokens": tokens}) + "\n")


if __name__ == "__main__":
    record()
