"""What does looking n-grams up take? `vbert bench look_up --data DIR --texts FILE ... [--skip NAME=FOLDER ...]`

- *keys*: n-grams built from token ids and looked up among the --entries most frequent ones of --texts, on one core:
  whole ones only (depth 3) and with back-off to single tokens (depth 1), for the test texts of each set;
- *batch*: for each skip backbone (`vbert distill`), 64 sequences of 32 tokens of the first set, all of whose n-grams
  are in a table: what looking up, gathering, adding up and entering take, as a share of the whole batch;
- *miss*: what computing the rows of a few missing n-grams takes, next to one layer for one text of 16 tokens.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from benchmarks.machine import Neighbours, commit, describe
from benchmarks.report import output_flags, publish
from benchmarks.timing import Timing, interleave
from runtime.lower_stores import LowerStores
from runtime.ngram_store import NgramStore, PathCosts
from training.texts import read_texts
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import read_backbone
from vbert.model import Model, SequenceInput
from vbert.ngram.counting import NgramCounts, head
from vbert.ngram.index import CODE_BITS, Keys, Located, build_index, ngram_keys
from vbert.ngram.table import NgramTable
from vbert.skip import SLOTS
from vbert.tables import build_table, count_texts
from vbert.tokenizer import Tokenizer

__all__ = ["main"]

SEQUENCES, LENGTH = 64, 32
SHORT, MISSING = 16, (1, 2, 4, 8)
_AT_LEAST = 1_000_000  # keys in one timing

Ids = NDArray[np.int64]


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    neighbours = Neighbours()
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        steps = bar.add_task("counting", total=1 + len(args.skip))
        rows += _keys(args)
        for item in args.skip:
            bar.update(steps, advance=1, description=item)
            rows += _batch(args, item)
    names = ("entries", "threads", "rounds")
    result = {
        "benchmark": "look_up",
        "machine": describe() | neighbours.report(),
        "commit": commit(),
        "config": {name: getattr(args, name) for name in names} | {"texts": [Path(text).name for text in args.texts]},
        "rows": rows,
    }
    publish(result, args)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vbert bench look_up", description=__doc__)
    output_flags(parser)
    parser.add_argument("--data", type=Path, required=True, help="folder with SET/test.jsonl.gz")
    parser.add_argument("--sets", nargs="+", default=["banking77", "sst2", "ag_news"])
    parser.add_argument("--backbone", required=True, metavar="FOLDER", help="whose tokenizer it is")
    parser.add_argument("--texts", nargs="+", required=True, help="corpus of the entries")
    parser.add_argument("--entries", type=int, default=3_000_000)
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(argv)


# ---- keys ----------------------------------------------------------------------------------------------------------


def _keys(args: argparse.Namespace) -> list[dict[str, Any]]:
    tokenizer = _tokenizer(args.backbone)
    counts = NgramCounts()
    for file in args.texts:
        count_texts(read_texts(file), tokenizer, counts)
    keys, _ = head(*counts.result(), max_entries=args.entries, coverage=1.0, min_count=1)
    index = build_index(keys)
    rows = []
    for name in args.sets:
        ids, cu_seqlens = _many(_tokens(args, name, tokenizer))
        for depth in (3, 1):
            asked = partial(_look_up, ids, cu_seqlens, index, depth)
            found, timing = asked().kept, interleave({"": asked}, rounds=args.rounds)[""]
            shares = {kept: round(float((found == kept).mean()), 4) for kept in (3, 2, 1, 0)}
            rows.append({"what": "keys", "set": name, "depth": depth, "entries": len(keys), "found": shares})
            rows[-1] |= _rate(timing, len(ids))
    return rows


def _look_up(ids: Ids, cu_seqlens: Ids, index: Keys, depth: int) -> Located:
    """As a server does it: the longest n-grams first, in one pass for each length."""
    located = Located.unknown(ngram_keys(ids, cu_seqlens), cu_seqlens)
    asking = np.ones(len(cu_seqlens) - 1, np.bool_)
    for length in range(SLOTS, depth - 1, -1):
        located.fill(asking, length, 0, index)
    return located


def _rate(timing: Timing, keys: int) -> dict[str, Any]:
    """Million keys a second."""
    p25, p50, p75 = (float(q) for q in np.percentile(timing.seconds, (25, 50, 75)))
    return {"mkeys_per_s": round(keys / p50 / 1e6, 2), "spread": round((p75 - p25) / p50, 4)}


def _tokenizer(folder: str) -> Tokenizer:
    backbone = read_backbone(folder)
    return Tokenizer.load(backbone.folder, backbone.config)


def _tokens(args: argparse.Namespace, name: str, tokenizer: Tokenizer) -> list[list[int]]:
    with gzip.open(args.data / name / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return [list(each.token_ids) for each in tokenizer.encode(texts, max_length=128, offsets=False)]


def _many(texts: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
    """The texts over and over, as ids and cu_seqlens."""
    lengths = np.array([len(text) for text in texts])
    times = -(-_AT_LEAST // int(lengths.sum()))
    ids = np.tile(np.concatenate([np.array(text, np.int64) for text in texts]), times)
    return ids, np.concatenate([[0], np.cumsum(np.tile(lengths, times))]).astype(np.int64)


# ---- a batch -------------------------------------------------------------------------------------------------------


def _batch(args: argparse.Namespace, item: str) -> list[dict[str, Any]]:
    name, _, folder = item.partition("=")
    backbone = read_backbone(folder or name)
    if not folder or backbone.skip is None:
        raise ConfigError(f"skip has {item!r}; write NAME=FOLDER, a folder of `vbert distill`")
    tokenizer = Tokenizer.load(backbone.folder, backbone.config)
    texts = list(itertools.islice(_cut(_tokens(args, args.sets[0], tokenizer)), SEQUENCES))
    model = Model.load(backbone, "auto", "cpu")
    assert model.local is not None
    with tempfile.TemporaryDirectory() as scratch:
        counts = NgramCounts()
        lengths = np.arange(0, SEQUENCES * LENGTH + 1, LENGTH)
        counts.add(np.concatenate([np.array(text, np.int64) for text in texts]), lengths)
        build_table(Path(scratch) / "table", model.local, counts, min_count=1)
        table = NgramTable(Path(scratch) / "table", backbone.skip.fingerprint)
        store = NgramStore(backbone.skip, model.config.hidden_size, tables={"": [table]}, cache_bytes=0, costs=_FREE)
        stores = LowerStores(None, store)
        types = [0] * LENGTH
        skipping = [SequenceInput(text, types, paths=("exact",)) for text in texts]
        plain = [SequenceInput(text, types) for text in texts]
        routes = stores.routes(skipping, pin=False)
        assert routes.skipped is not None
        assert not len(routes.skipped.entry.missing)
        entry = routes.skipped.entry

        def whole() -> None:
            found = stores.routes(skipping, pin=False)
            model.forward(model.pack_joined(skipping, stores.ways(found, SEQUENCES)))

        local = model.local
        systems = {
            "look_up": lambda: stores.routes(skipping, pin=False),
            "enter": lambda: local.enter(entry),
            "batch": whole,
        }
        if backbone.skip.config.first_layer:
            systems["plain"] = lambda: model.forward(model.pack(plain))
        timings = interleave(systems, rounds=args.rounds)
    ms = {what: timing.row(1)["p50_ms"] for what, timing in timings.items()}
    row = {"what": "batch", "system": name, "ms": ms, "spread": timings["batch"].row(1)["spread"]}
    row["share"] = round((ms["look_up"] + ms["enter"]) / ms["batch"], 4)
    return [row, {"what": "miss", "system": name, "ms": _misses(model, texts[0], args.rounds)}]


def _misses(model: Model, text: Sequence[int], rounds: int) -> dict[str, float]:
    local, types = model.local, [0] * SHORT
    assert local is not None
    batch = model.pack([SequenceInput(text[:SHORT], types)])
    keys = np.arange(1, MISSING[-1] + 1, dtype=np.uint64) << np.uint64(CODE_BITS)  # single tokens
    systems = {str(count): partial(local.encode, keys[:count]) for count in MISSING}
    timings = interleave(systems | {"plain": lambda: model.forward(batch)}, rounds=rounds * 4)
    ms = {what: timing.row(1)["p50_ms"] for what, timing in timings.items()}
    return ms | {"layer": round(ms.pop("plain") / model.config.num_layers, 4)}


def _free(count: int) -> float:
    return 0.0


_FREE = PathCosts(_free, _free, _free, _free)


def _cut(texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Sequences of equal length from the texts one after the other."""
    every = itertools.chain.from_iterable(texts)
    while len(part := list(itertools.islice(every, LENGTH))) == LENGTH:
        yield part


if __name__ == "__main__":
    main()
