"""`vbert tenants compress`: a fully fine-tuned model as a tenant of the backbone it came from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.output import show

if TYPE_CHECKING:
    from vbert.formats.compressed import Compressed
    from vbert.formats.transformers_folder import Backbone
    from vbert.tokenizer import Encoded

__all__ = ["add_flags", "run"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    from runtime.flags import add_flag

    add_flag(parser, "backbone", required=True, help="transformers folder of the backbone", metavar="FOLDER")
    parser.add_argument("--task", help="classify, token_classify, embed or rerank, if the folder leaves it open")
    parser.add_argument("--rank", type=int, default=64, help="the most of a weight's change; 0: sparse only")
    parser.add_argument("--error", type=float, default=0.05, help="part of a change that may be lost for a lower rank")
    parser.add_argument("--density", type=float, default=0.05, help="part of the weights that sparse changes keep")
    parser.add_argument("--texts", help=".txt or .jsonl file to compare the answers on, also with .gz", metavar="FILE")
    parser.add_argument("--max-texts", type=int, default=200, metavar="N")
    parser.add_argument("--store-dtype", choices=("float32", "bfloat16"), default="float32", help="of the file")


def run(args: argparse.Namespace) -> None:
    from training.compare_answers import compare_answers
    from training.progress import progress_bar
    from vbert.formats import read_backbone
    from vbert.formats.compressed import Compression, compress_folder
    from vbert.formats.convert import to_own_file

    backbone = read_backbone(args.backbone)
    compression = Compression(max_rank=args.rank, max_error=args.error, max_density=args.density)
    with progress_bar() as progress:
        compressed = compress_folder(
            Path(args.folder),
            backbone,
            compression,
            task=args.task,
            progress=lambda done, total: progress("compressing layers", done, total),
        )
        data = to_own_file(compressed.module, backbone, args.store_dtype)
        ours, theirs = (backbone, compressed.module), (compressed.original, compressed.whole)
        report = compare_answers(ours, theirs, _inputs(args, backbone), progress)
    out = Path(args.file)
    out.write_bytes(data)
    show({"file": str(out), "num_bytes": len(data)} | _losses(compressed) | report, as_json=args.json)


def _inputs(args: argparse.Namespace, backbone: Backbone) -> list[Encoded]:
    from itertools import islice

    from training.texts import read_texts
    from vbert.formats.original import TEXTS
    from vbert.tokenizer import Tokenizer

    texts = list(islice(read_texts(args.texts), args.max_texts)) if args.texts else list(TEXTS)
    tokenizer = Tokenizer.load(backbone.folder, backbone.config)
    return tokenizer.encode(texts, max_length=backbone.config.max_length, offsets=False)


def _losses(compressed: Compressed) -> dict[str, Any]:
    from vbert.formats.compressed import worst

    losses, worst_of = compressed.losses, worst(compressed.losses)
    ranks = [loss.size for loss in losses if loss.kind == "low_rank"]
    return {
        "original_bytes": sum(4 * weight.numel() for weight in compressed.original.weights.values()),
        "weights_low_rank": len(ranks),
        "weights_sparse": sum(loss.kind == "sparse" for loss in losses),
        "dropped": [loss.weight for loss in losses if loss.kind == "dropped"],
        "mean_rank": round(sum(ranks) / len(ranks), 1) if ranks else 0,
        "lost_part": round(compressed.error, 6),
        "worst_weight": worst_of.weight if worst_of is not None and worst_of.error else None,
    }
