"""Any readable checkpoint into the bytes of a native file, and a native file checked whole against a backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vbert.checkpoint import check_sparse, load_tensors, write_tenant
from vbert.formats import read_tenant
from vbert.formats.original import self_tests
from vbert.formats.transformers_folder import Backbone
from vbert.header import TenantHeader, parse_header

__all__ = ["check_native", "to_native"]


def to_native(path: Path, backbone: Backbone, *, task: str | None = None) -> bytes:
    """A native file as it is; anything else read into deltas, with the original library's answers as self-tests.

    task: a head kind, for folders that leave it open. Raises RefusedCheckpoint, CorruptFile, SelfTestFailed.
    """
    if path.is_file():
        return path.read_bytes()
    module = read_tenant(path, backbone, task=task)
    if not module.self_tests:
        module = replace(module, self_tests=self_tests(path, backbone, module))
    return write_tenant(module)


def check_native(data: bytes, backbone: Backbone) -> TenantHeader:
    """Every check that needs no memory budget: complete, finite, made for this backbone, inside its shapes.

    Raises CorruptFile, WrongBackbone.
    """
    header = parse_header(data)
    header.check(backbone.config, backbone.fingerprint)
    tensors = load_tensors(data)
    if (layout := header.layouts.get("sparse")) is not None:
        columns, row_starts = tensors["delta.sparse.columns"], tensors["delta.sparse.row_starts"]
        check_sparse(layout, columns, row_starts, backbone.config)
    return header
