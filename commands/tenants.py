"""`vbert tenants`: add, list, switch and remove the tenants of a store or a server, look into checkpoints and files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands import compress
from commands.output import COLUMNS, add_json_flag, complain, show
from commands.target import add_target_flags, check_name, put, target

if TYPE_CHECKING:
    from vbert.formats.transformers_folder import Backbone

__all__ = ["add_flags"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One sub-command each, with its own `run`."""
    from runtime.flags import add_flag

    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    text = "convert a checkpoint (PEFT, AdapterHub, transformers, native) and serve it as a tenant's new version"
    add = _command(commands, "add", _add, text, "NAME", "FOLDER")
    add_all = _command(commands, "import", _import, "add every checkpoint in DIR under its own name", "DIR")
    listing = _command(commands, "list", _list, "list the active version of every tenant")
    details = _command(commands, "show", _tell("get"), "show all that is known of a tenant's active version", "NAME")
    versions = _command(commands, "versions", _tell("versions"), "list the versions of a tenant, oldest first", "NAME")
    activate = _command(commands, "activate", _activate, "serve another stored version", "NAME", "VERSION")
    rollback = _command(commands, "rollback", _tell("rollback"), "serve the version that was active before", "NAME")
    remove = _command(commands, "remove", _remove, "forget a tenant with all its versions", "NAME")
    inspect = _command(commands, "inspect", _inspect, "say what is in a checkpoint before it is added", "FOLDER")
    text = "make a small tenant of a fully fine-tuned model, and say what is lost"
    smaller = _command(commands, "compress", compress.run, text, "FOLDER", "FILE")
    compress.add_flags(smaller)
    check = _command(commands, "check", _check, "compare every file of a store with its checksum")
    for each in (add, add_all, inspect):
        each.add_argument("--task", help="classify, token_classify, embed or rerank, if checkpoints leave it open")
    for each in (add, add_all):
        each.add_argument("--store-dtype", choices=("float32", "bfloat16"), default="float32", help="of tenant files")
        each.add_argument("--no-activate", action="store_true", help="store versions, go on serving the present ones")
        add_flag(each, "backbone", required=True, help="transformers folder of the backbone", metavar="FOLDER")
    add_flag(inspect, "backbone", help="say whether it fits this backbone, too", metavar="FOLDER")
    add_flag(check, "store", required=True, help="folder of the tenant store", metavar="DIR")
    for each in (add, add_all, listing, details, versions, activate, rollback, remove):
        add_target_flags(each)
    for each in (add, activate, rollback, remove):
        each.add_argument("--if-match", type=int, metavar="N", help="only if N is the active version; 0: none is")


def _command(commands: Any, name: str, run: Callable[..., Any], text: str, *names: str) -> argparse.ArgumentParser:
    """One sub-command with its positional arguments and --json."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:])
    for each in names:
        parser.add_argument(each.lower(), metavar=each, type=int if each == "VERSION" else str)
    add_json_flag(parser)
    parser.set_defaults(run=run)
    return parser


def _add(args: argparse.Namespace) -> None:
    from vbert.formats import read_backbone

    with target(args, create=True) as store:
        data = _native(args.name, Path(args.folder), read_backbone(args.backbone), args)
        added = put(store, args.name, data, activate=not args.no_activate, if_match=args.if_match)
    show(added, as_json=args.json)


def _import(args: argparse.Namespace) -> int:
    """Refused checkpoints are listed at the end; the others are added. Running it again adds nothing twice."""
    from training.progress import progress_bar
    from vbert.errors import VbertError
    from vbert.formats import read_backbone

    paths = [path for path in sorted(Path(args.dir).iterdir()) if path.is_dir() or path.suffix == ".safetensors"]
    added: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    with target(args, create=True) as store, progress_bar() as progress:
        backbone = read_backbone(args.backbone)
        for done, path in enumerate(paths, 1):
            name = path.name.removesuffix(".safetensors")
            try:
                data = _native(name, path, backbone, args)
                added.append(put(store, name, data, activate=not args.no_activate))
            except VbertError as error:
                refused.append({"tenant": name, "error": error.message})
            progress("adding tenants", done, len(paths))
    if args.json:
        print(json.dumps({"added": added, "refused": refused}))
    else:
        show(added, columns=(*COLUMNS, "new"))
        if refused:
            show(refused, columns=("tenant", "error"))
    return complain(f"{len(refused)} of {len(paths)} checkpoints are refused") if refused else 0


def _native(name: str, path: Path, backbone: Backbone, args: argparse.Namespace) -> bytes:
    """The native file of a checkpoint, checked. Names are checked first: a conversion may take a minute."""
    from vbert.formats.convert import check_native, to_native

    check_name(name, backbone.name)
    data = to_native(path, backbone, task=args.task, dtype=args.store_dtype)
    check_native(data, backbone)
    return data


def _list(args: argparse.Namespace) -> None:
    found: list[Any] = []
    with target(args) as store:
        while page := store.list(found[-1].tenant if found else ""):
            found += page
    show(found, as_json=args.json)


def _tell(method: str) -> Callable[[argparse.Namespace], None]:
    """The command that prints what a method of the store says of one tenant."""

    def tell(args: argparse.Namespace) -> None:
        terms = {"if_match": args.if_match} if "if_match" in args else {}
        with target(args) as store:
            show(getattr(store, method)(args.name, **terms), as_json=args.json)

    return tell


def _activate(args: argparse.Namespace) -> None:
    with target(args) as store:
        show(store.activate(args.name, args.version, if_match=args.if_match), as_json=args.json)


def _remove(args: argparse.Namespace) -> None:
    with target(args) as store:
        store.remove(args.name, if_match=args.if_match)
    show({"tenant": args.name, "removed": True}, as_json=args.json)


def _inspect(args: argparse.Namespace) -> int:
    """What `add` would refuse ends with exit code 2, too, after saying what is there."""
    from vbert.formats import inspect, read_backbone

    report = inspect(Path(args.folder), read_backbone(args.backbone) if args.backbone else None, task=args.task)
    show(report, as_json=args.json)
    return complain("; ".join(report["refused"])) if report["refused"] else 0


def _check(args: argparse.Namespace) -> None:
    from runtime.store import TenantStore
    from training.progress import progress_bar

    with TenantStore(args.store, create=False) as store:
        with progress_bar() as progress:
            num_blobs = store.check(lambda done, total: progress("checking", done, total))
        show({"store": args.store, "blobs": num_blobs, "num_bytes": store.num_bytes()}, as_json=args.json)
