"""The store or the server that a command is about, and how a native file is put there."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from commands.output import Wrong

if TYPE_CHECKING:
    from runtime.remote import RemoteStore
    from runtime.store import TenantStore

__all__ = ["add_target_flags", "check_name", "put", "target", "where"]


def add_target_flags(parser: argparse.ArgumentParser) -> None:
    from runtime.flags import add_flag

    place = parser.add_mutually_exclusive_group()
    place.add_argument("--store", help="folder of the tenant store", metavar="DIR")
    place.add_argument("--server", help="address of a server, such as http://127.0.0.1:8080", metavar="URL")
    add_flag(parser, "key", default="", help="API key of scope admin; other users of the machine do not see VBERT_KEY")


@contextlib.contextmanager
def target(args: argparse.Namespace, *, create: bool = False) -> Iterator[TenantStore | RemoteStore]:
    """The store or the server a command is about. A wrong address or key shows here, before any long work."""
    folder, url = where(args)
    if folder and not url:
        from runtime.store import TenantStore

        with TenantStore(folder, create=create) as store:
            yield store
    elif url and not folder:
        from runtime.remote import RemoteStore

        (server := RemoteStore(url, args.key)).list(limit=1)
        yield server
    else:
        raise Wrong("give --store DIR or --server URL, one of them")


def where(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """Store and server, one of them None. Either flag goes before both environment variables."""
    if args.store or args.server:
        return args.store, args.server
    return os.environ.get("VBERT_STORE"), os.environ.get("VBERT_SERVER")


def check_name(name: str, backbone_name: str) -> None:
    from runtime.errors import InvalidTenantId
    from runtime.store import check_tenant_id

    if check_tenant_id(name) == backbone_name:
        raise InvalidTenantId(f"{name!r} is the name of the backbone; choose another name")


def put(store: TenantStore | RemoteStore, name: str, data: bytes, **options: Any) -> dict[str, Any]:
    from runtime.versions import ModuleFacts
    from vbert.header import parse_header

    version, created = store.put(name, data, ModuleFacts.of(parse_header(data)), **options)
    return asdict(version) | {"new": created}
