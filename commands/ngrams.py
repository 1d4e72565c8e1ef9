"""`vbert ngrams`: tables of n-grams for a skip backbone."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.output import Wrong, add_json_flag, show

if TYPE_CHECKING:
    from vbert.tokenizer import Input

__all__ = ["add_flags"]

_DTYPES = ("float16", "int8")
_OF_A_TABLE = ("trigrams", "bigrams", "tokens", "bytes")


def add_flags(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    build = commands.add_parser("build", help="count a corpus, and encode its most frequent n-grams")
    build.set_defaults(run=_build)
    build.add_argument("out", type=Path, metavar="FILE", help="table to write, or to replace beside its readers")
    build.add_argument("--backbone", type=Path, required=True, help="folder of the skip backbone")
    build.add_argument("--texts", nargs="+", required=True, help=".txt or .jsonl files, each also with .gz")
    keys = "n-grams counted at once, 16 bytes each (default: 20000000)"
    build.add_argument("--max-keys", type=int, default=20_000_000, help=keys)
    build.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    _keep_flags(build, min_count=2, share="of all tri-grams in the text to cover")

    merge = commands.add_parser("merge", help="one table of several; of an n-gram in two, the first one's row")
    merge.set_defaults(run=_merge)
    merge.add_argument("out", type=Path, metavar="FILE")
    merge.add_argument("tables", type=Path, nargs="+", metavar="TABLE")
    merge.add_argument("--dtype", choices=_DTYPES, help="of the rows; default: as the first table")

    prune = commands.add_parser("prune", help="keep the most frequent n-grams of a table")
    prune.set_defaults(run=_prune)
    prune.add_argument("out", type=Path, metavar="FILE")
    prune.add_argument("table", type=Path, metavar="TABLE")
    _keep_flags(prune, min_count=1, share="of the table's tri-grams, as often as each was counted, to keep")

    stats = commands.add_parser("stats", help="what a table holds, and how much of some text it has")
    stats.set_defaults(run=_stats)
    stats.add_argument("table", type=Path, metavar="TABLE")
    stats.add_argument("--texts", nargs="+", default=[], help="files to measure the coverage of")
    stats.add_argument("--backbone", type=Path, help="its tokenizer is needed with --texts")

    check = commands.add_parser("check", help="read a whole table: is all of it as it was written?")
    check.set_defaults(run=_check)
    check.add_argument("table", type=Path, metavar="TABLE")
    for each in (build, merge, prune, stats, check):
        add_json_flag(each)


def _keep_flags(parser: argparse.ArgumentParser, *, min_count: int, share: str) -> None:
    parser.add_argument("--coverage", type=float, default=1.0, help=f"share {share} (default: 1.0)")
    least = f"keep n-grams seen this often; tokens always (default: {min_count})"
    parser.add_argument("--min-count", type=int, default=min_count, help=least)
    parser.add_argument("--max-bytes", type=int, help="size of the file, but for its header (default: any)")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the rows; int8 is half as large (default: float16)")


def _build(args: argparse.Namespace) -> None:
    from training.progress import progress_bar
    from training.texts import read_texts
    from vbert.encoder import Encoder
    from vbert.formats.transformers_folder import read_backbone
    from vbert.local_layers import LocalLayers
    from vbert.model import resolve_device, resolve_dtype
    from vbert.ngram.counting import NgramCounts
    from vbert.tables import build_table, count_texts
    from vbert.tokenizer import Tokenizer

    if not args.out.parent.is_dir():
        raise Wrong(f"there is no folder {args.out.parent} to write {args.out.name} to; make it first")
    backbone = read_backbone(args.backbone)
    if backbone.skip is None:
        raise Wrong(f"{args.backbone} has no local layers; give the folder of a skip backbone, see `vbert distill`")
    tokenizer = Tokenizer.load(backbone.folder, backbone.config)
    counts, num_texts = NgramCounts(args.max_keys), 0
    sizes = [path.stat().st_size if (path := Path(file)).is_file() else 0 for file in args.texts]
    with progress_bar() as progress:
        for i, file in enumerate(args.texts):

            def told(num_bytes: int, i: int = i, name: str = Path(file).name) -> None:
                progress(f"counting: {name}, kB", (sum(sizes[:i]) + num_bytes) // 1000, sum(sizes) // 1000)

            told(0)
            num_texts += count_texts(read_texts(file, told), tokenizer, counts)
        progress("counting: done, kB", sum(sizes) // 1000, sum(sizes) // 1000)
        if not num_texts:
            raise Wrong(f"{', '.join(args.texts)}: no text at all; give files that have some")
        device = resolve_device(args.device)
        encoder = Encoder(backbone.config, backbone.weights, resolve_dtype("float32", device), device)
        local = LocalLayers(encoder, backbone.skip)
        entries = build_table(args.out, local, counts, told=progress, **_kept(args))
    _show_table(args, texts=num_texts, occurrences=counts.num_occurrences, forgotten=counts.forgotten, entries=entries)


def _merge(args: argparse.Namespace) -> None:
    from training.progress import progress_bar
    from vbert.ngram.table import NgramTable
    from vbert.tables import merge_tables

    tables = [NgramTable(path, None) for path in args.tables]
    with progress_bar() as progress:
        entries = merge_tables(args.out, tables, dtype=args.dtype, told=progress)
    _show_table(args, entries=entries)


def _prune(args: argparse.Namespace) -> None:
    from training.progress import progress_bar
    from vbert.ngram.table import NgramTable
    from vbert.tables import prune_table

    table = NgramTable(args.table, None)
    with progress_bar() as progress:
        entries = prune_table(args.out, table, told=progress, **_kept(args))
    _show_table(args, entries=entries, of=len(table))


def _check(args: argparse.Namespace) -> None:
    from vbert.ngram.table import NgramTable

    table = NgramTable(args.table, None)
    table.check()
    show({"table": str(args.table), "entries": len(table), "bytes": table.num_bytes}, as_json=args.json)


def _stats(args: argparse.Namespace) -> None:
    from vbert.ngram.table import NgramTable
    from vbert.tables import describe_table

    table = NgramTable(args.table, None)
    told = describe_table(table)
    if args.texts:
        told |= _coverage(args, table)
    show(told, as_json=args.json)


def _coverage(args: argparse.Namespace, table: Any) -> dict[str, Any]:
    from vbert.formats.transformers_folder import read_backbone
    from vbert.tables import coverage_of
    from vbert.tokenizer import Tokenizer

    if args.backbone is None:
        raise Wrong("--texts needs --backbone, whose tokenizer cuts them")
    backbone = read_backbone(args.backbone)
    if backbone.skip is None:
        raise Wrong(f"{args.backbone} has no local layers; give the folder of the skip backbone the table belongs to")
    table.check_made_by(backbone.skip.base)
    tokenizer = Tokenizer.load(backbone.folder, backbone.config)
    found = coverage_of(table, _every_text(args.texts), tokenizer)
    shares = {"covered_by_trigrams": found.tri, "by_bigrams": found.bi, "by_tokens": found.uni}
    return {"tokens_of_text": found.tokens} | {name: round(share, 4) for name, share in shares.items()}


def _every_text(files: Sequence[str]) -> Iterator[Input]:
    from training.texts import read_texts

    for file in files:
        yield from read_texts(file)


def _kept(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("coverage", "min_count", "max_bytes", "dtype")}


def _show_table(args: argparse.Namespace, **told: Any) -> None:
    from vbert.ngram.table import NgramTable
    from vbert.tables import describe_table

    about = describe_table(NgramTable(args.out, None))
    show({"table": str(args.out), **told} | {n: about[n] for n in _OF_A_TABLE}, as_json=args.json)
