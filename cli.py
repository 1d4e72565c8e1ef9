"""The `vbert` command: serve, tenants, train, bench, keys. One function a command, with its imports inside it.

Results go to stdout, as a table or with --json as one JSON value; progress and errors go to stderr. An error is one
line and exit code 2, also where a part of a bulk import was refused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from runtime.remote import RemoteStore
    from runtime.store import TenantStore
    from vbert.formats.transformers_folder import Backbone

__all__ = ["main"]

_COLUMNS = ("tenant", "version", "active", "task", "kinds", "num_bytes", "created_s")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 refused or failed with one line on stderr, 130 interrupted, 141 nobody reads the output."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(arguments).parse_args(arguments)
        code: int | None = args.run(args)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter complains when it flushes at exit
        return 141
    except (_Wrong, OSError) as error:
        return _complain(f"{error}; check the path and its rights" if getattr(error, "filename", None) else str(error))
    except Exception as error:
        from vbert.errors import VbertError

        if isinstance(error, VbertError):
            return _complain(error.message)
        raise  # our own bug: the traceback is what helps


class _Wrong(Exception):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        from runtime.flags import ENVIRONMENT_HELP

        super().__init__(epilog=ENVIRONMENT_HELP, **options)

    def error(self, message: str) -> NoReturn:
        raise _Wrong(f"{message}; see {self.prog} --help")


# ---- the command line ------------------------------------------------------------------------------------------------


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Only the command that is run gets its flags, so `vbert --help` imports next to nothing."""
    parser = _Parser(prog="vbert", description="Serve many tenants on one frozen encoder.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    made = {
        "serve": (_command(commands, "serve", _serve, "serve the tenants of a store over HTTP"), _serve_flags),
        "tenants": (_command(commands, "tenants", None, "add, list, switch and remove tenants"), _tenants_commands),
        "train": (_command(commands, "train", _train, "train a tenant on a frozen backbone from jsonl"), _train_flags),
        "bench": (_command(commands, "bench", _bench, "run a benchmark by name; its own flags follow"), _bench_flags),
        "keys": (_command(commands, "keys", _keys, "make an API key for `vbert serve --keys FILE`"), _keys_flags),
    }
    if arguments and arguments[0] in made:
        chosen, add_flags = made[arguments[0]]
        add_flags(chosen)
    return parser


def _command(commands: Any, name: str, run: Callable[..., Any] | None, text: str, *names: str) -> Any:
    """One sub-command with its positional arguments and --json."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:])
    for each in names:
        parser.add_argument(each.lower(), metavar=each, type=int if each == "VERSION" else str)
    if run not in (None, _bench):  # benchmarks have their own
        parser.add_argument("--json", action="store_true", help="print one JSON value")
    parser.set_defaults(run=run)
    return parser


def _serve_flags(parser: argparse.ArgumentParser) -> None:
    from runtime.config import EngineConfig
    from runtime.flags import add_flags
    from serve import HttpConfig

    add_flags(parser, EngineConfig)
    add_flags(parser, HttpConfig)


def _train_flags(parser: argparse.ArgumentParser) -> None:
    # Before torch is loaded, which the settings do. Threads that spin while they wait for each other make a run beside
    # a busy neighbour several times as long: 33 to 42 s in place of 7 to 16 s for 256 rows on two cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from runtime.flags import add_flags
    from training.config import TrainConfig

    parser.add_argument("name", nargs="?", metavar="NAME", help="tenant of --store or --server; not needed with --out")
    parser.add_argument("--recipe", help="TOML file with settings; flags override them", metavar="FILE")
    add_flags(parser, TrainConfig)
    _target_flags(parser)


def _bench_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="without it, the names are listed")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")


def _keys_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="who the key is for; queue shares are counted by it")
    parser.add_argument("--scopes", default="infer", help="of infer, admin, metrics (default: infer)", metavar="A,B")
    parser.add_argument("--tenants", default="*", help="patterns of the tenants it may use (default: *)", metavar="A,B")
    parser.add_argument("--file", help="append the key, hashed, to this file", metavar="FILE")


def _tenants_commands(parser: argparse.ArgumentParser) -> None:
    from runtime.flags import add_flag

    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    text = "convert a checkpoint (PEFT, AdapterHub, transformers, native) and serve it as a tenant's new version"
    add = _command(commands, "add", _add, text, "NAME", "FOLDER")
    add_all = _command(commands, "import", _import, "add every checkpoint in DIR under its own name", "DIR")
    listing = _command(commands, "list", _list, "list the active version of every tenant")
    show = _command(commands, "show", _tell("get"), "show all that is known of a tenant's active version", "NAME")
    versions = _command(commands, "versions", _tell("versions"), "list the versions of a tenant, oldest first", "NAME")
    activate = _command(commands, "activate", _activate, "serve another stored version", "NAME", "VERSION")
    rollback = _command(commands, "rollback", _tell("rollback"), "serve the version that was active before", "NAME")
    remove = _command(commands, "remove", _remove, "forget a tenant with all its versions", "NAME")
    inspect = _command(commands, "inspect", _inspect, "say what is in a checkpoint before it is added", "FOLDER")
    check = _command(commands, "check", _check, "compare every file of a store with its checksum")
    for each in (add, add_all, inspect):
        each.add_argument("--task", help="classify, token_classify, embed or rerank, if checkpoints leave it open")
    for each in (add, add_all):
        each.add_argument("--no-activate", action="store_true", help="store versions, go on serving the present ones")
        add_flag(each, "backbone", required=True, help="transformers folder of the backbone", metavar="FOLDER")
    add_flag(inspect, "backbone", help="say whether it fits this backbone, too", metavar="FOLDER")
    add_flag(check, "store", required=True, help="folder of the tenant store", metavar="DIR")
    for each in (add, add_all, listing, show, versions, activate, rollback, remove):
        _target_flags(each)
    for each in (add, activate, rollback, remove):
        each.add_argument("--if-match", type=int, metavar="N", help="only if N is the active version; 0: none is")


def _target_flags(parser: argparse.ArgumentParser) -> None:
    from runtime.flags import add_flag

    where = parser.add_mutually_exclusive_group()
    where.add_argument("--store", help="folder of the tenant store", metavar="DIR")
    where.add_argument("--server", help="address of a server, such as http://127.0.0.1:8080", metavar="URL")
    add_flag(parser, "key", default="", help="API key of scope admin; other users of the machine do not see VBERT_KEY")


@contextlib.contextmanager
def _target(args: argparse.Namespace, *, create: bool = False) -> Iterator[TenantStore | RemoteStore]:
    """The store or the server a command is about. A wrong address or key shows here, before any long work."""
    folder, url = _where(args)
    if folder and not url:
        from runtime.store import TenantStore

        with TenantStore(folder, create=create) as store:
            yield store
    elif url and not folder:
        from runtime.remote import RemoteStore

        (server := RemoteStore(url, args.key)).list(limit=1)
        yield server
    else:
        raise _Wrong("give --store DIR or --server URL, one of them")


def _where(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """Store and server, one of them None. Either flag goes before both environment variables."""
    if args.store or args.server:
        return args.store, args.server
    return os.environ.get("VBERT_STORE"), os.environ.get("VBERT_SERVER")


# ---- serve, train, bench, keys ---------------------------------------------------------------------------------------


def _serve(args: argparse.Namespace) -> None:
    import logging

    from runtime.config import EngineConfig
    from runtime.flags import given
    from serve import HttpConfig, run

    engine_config = EngineConfig(**given(args, EngineConfig))
    for name in ("backbone", "store"):
        if not getattr(engine_config, name):
            raise _Wrong(f"--{name} is not given; see vbert serve --help")

    def ready(url: str) -> None:
        print(json.dumps({"url": url, "pid": os.getpid()}) if args.json else f"serving on {url}", flush=True)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run(engine_config, HttpConfig(**given(args, HttpConfig)), on_ready=ready)


def _train(args: argparse.Namespace) -> None:
    import tempfile

    from runtime.flags import given
    from training.progress import progress_bar
    from training.train_peft import TrainConfig, read_recipe, run
    from vbert.formats.transformers_folder import backbone_name

    settings = (read_recipe(args.recipe) if args.recipe else {}) | given(args, TrainConfig)
    to_store = args.name is not None and any(_where(args))
    if not to_store and (args.store or args.server or not settings.get("out")):
        raise _Wrong("the result has no place; give NAME and --store DIR or --server URL, or give --out FILE")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        config = TrainConfig(**{"out": f"{folder}/tenant.safetensors"} | settings)
        if to_store and config.backbone:
            _check_name(args.name, backbone_name(Path(config.backbone)))
        store = stack.enter_context(_target(args, create=True)) if to_store else None
        with progress_bar() as progress:
            report = asdict(run(config, progress=progress)) | {"path": settings.get("out")}
        if store is not None:
            report |= _put(store, args.name, Path(config.out).read_bytes())
    _print(report, as_json=args.json)


def _bench(args: argparse.Namespace) -> int:
    import importlib

    folder = Path(__file__).parent / "benchmarks"
    names = sorted(path.stem for path in folder.glob("*.py") if "\ndef main(argv" in path.read_text("utf-8"))
    if args.name is None:
        print("\n".join(names))
        return 0
    if args.name not in names:
        raise _Wrong(f"benchmark {args.name!r} is not one of {', '.join(names) or 'none'} in {folder}")
    code: int | None = importlib.import_module(f"benchmarks.{args.name}").main(args.arguments)
    return code or 0


def _keys(args: argparse.Namespace) -> None:
    """The secret is shown once; the file only ever has its hash."""
    from serve import make_key

    secret, key = make_key(args.name, args.scopes.split(","), args.tenants.split(","))
    if args.file:
        with os.fdopen(os.open(args.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
            file.write(key.line() + "\n")
    _print({"name": key.name, "key": secret, "line": key.line()}, as_json=args.json)


# ---- tenants ---------------------------------------------------------------------------------------------------------


def _add(args: argparse.Namespace) -> None:
    from vbert.formats import read_backbone

    with _target(args, create=True) as store:
        data = _native(args.name, Path(args.folder), read_backbone(args.backbone), args.task)
        added = _put(store, args.name, data, activate=not args.no_activate, if_match=args.if_match)
    _print(added, as_json=args.json)


def _import(args: argparse.Namespace) -> int:
    """Refused checkpoints are listed at the end; the others are added. Running it again adds nothing twice."""
    from training.progress import progress_bar
    from vbert.errors import VbertError
    from vbert.formats import read_backbone

    paths = [path for path in sorted(Path(args.dir).iterdir()) if path.is_dir() or path.suffix == ".safetensors"]
    added: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    with _target(args, create=True) as store, progress_bar() as progress:
        backbone = read_backbone(args.backbone)
        for done, path in enumerate(paths, 1):
            name = path.name.removesuffix(".safetensors")
            try:
                data = _native(name, path, backbone, args.task)
                added.append(_put(store, name, data, activate=not args.no_activate))
            except VbertError as error:
                refused.append({"tenant": name, "error": error.message})
            progress("adding tenants", done, len(paths))
    if args.json:
        print(json.dumps({"added": added, "refused": refused}))
    else:
        _print(added, columns=(*_COLUMNS, "new"))
        if refused:
            _print(refused, columns=("tenant", "error"))
    return _complain(f"{len(refused)} of {len(paths)} checkpoints are refused") if refused else 0


def _native(name: str, path: Path, backbone: Backbone, task: str | None) -> bytes:
    """The native file of a checkpoint, checked. Names are checked first: a conversion may take a minute."""
    from vbert.formats.convert import check_native, to_native

    _check_name(name, backbone.name)
    data = to_native(path, backbone, task=task)
    check_native(data, backbone)
    return data


def _check_name(name: str, backbone_name: str) -> None:
    from runtime.errors import InvalidTenantId
    from runtime.store import check_tenant_id

    if check_tenant_id(name) == backbone_name:
        raise InvalidTenantId(f"{name!r} is the name of the backbone; choose another name")


def _put(store: TenantStore | RemoteStore, name: str, data: bytes, **options: Any) -> dict[str, Any]:
    from runtime.store import ModuleFacts
    from vbert.header import parse_header

    version, created = store.put(name, data, ModuleFacts.of(parse_header(data)), **options)
    return asdict(version) | {"new": created}


def _list(args: argparse.Namespace) -> None:
    found: list[Any] = []
    with _target(args) as store:
        while page := store.list(found[-1].tenant if found else ""):
            found += page
    _print(found, as_json=args.json)


def _tell(method: str) -> Callable[[argparse.Namespace], None]:
    """The command that prints what a method of the store says of one tenant."""

    def tell(args: argparse.Namespace) -> None:
        terms = {"if_match": args.if_match} if "if_match" in args else {}
        with _target(args) as store:
            _print(getattr(store, method)(args.name, **terms), as_json=args.json)

    return tell


def _activate(args: argparse.Namespace) -> None:
    with _target(args) as store:
        _print(store.activate(args.name, args.version, if_match=args.if_match), as_json=args.json)


def _remove(args: argparse.Namespace) -> None:
    with _target(args) as store:
        store.remove(args.name, if_match=args.if_match)
    _print({"tenant": args.name, "removed": True}, as_json=args.json)


def _inspect(args: argparse.Namespace) -> int:
    """What `add` would refuse ends with exit code 2, too, after saying what is there."""
    from vbert.formats import inspect, read_backbone

    report = inspect(Path(args.folder), read_backbone(args.backbone) if args.backbone else None, task=args.task)
    _print(report, as_json=args.json)
    return _complain("; ".join(report["refused"])) if report["refused"] else 0


def _check(args: argparse.Namespace) -> None:
    from runtime.store import TenantStore
    from training.progress import progress_bar

    with TenantStore(args.store, create=False) as store:
        with progress_bar() as progress:
            num_blobs = store.check(lambda done, total: progress("checking", done, total))
        _print({"store": args.store, "blobs": num_blobs, "num_bytes": store.num_bytes()}, as_json=args.json)


def _complain(message: str) -> int:
    from runtime.listing import printable

    print("vbert: error:", printable(" ".join(message.split())), file=sys.stderr)
    return 2


def _print(value: Any, *, as_json: bool = False, columns: Sequence[str] = _COLUMNS) -> None:
    """A dict or dataclass, or a list of them. What a list of tenants shows stands first in a single one, too."""
    from runtime.listing import record, table

    several = isinstance(value, list)
    values = [item if isinstance(item, dict) else asdict(item) for item in (value if several else [value])]
    values = [{name: item[name] for name in _COLUMNS if name in item} | item for item in values]
    if as_json:
        print(json.dumps(values if several else values[0]))
    else:
        print(table(values, columns) if several else record(values[0]))


if __name__ == "__main__":
    sys.exit(main())
