"""Any readable checkpoint into the bytes of a native file, and a native file checked whole against a backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vbert.checkpoint import check_sparse, load_tensors, read_tenant_bytes, write_tenant
from vbert.formats import read_tenant
from vbert.formats.original import self_tests
from vbert.formats.transformers_folder import Backbone
from vbert.header import TenantHeader, parse_header
from vbert.reference import dense_forward
from vbert.selftest import check_outputs, make_self_tests
from vbert.tenant import TenantModule
from vbert.tokenizer import Tokenizer

__all__ = ["check_native", "to_native", "to_own_file"]


def to_native(path: Path, backbone: Backbone, *, task: str | None = None, dtype: str = "float32") -> bytes:
    """A native file as it is; anything else read into deltas, with the original library's answers as self-tests.

    task: a head kind, for folders that leave it open.  dtype: the deltas are stored in, float32 or bfloat16.
    Raises RefusedCheckpoint, CorruptFile, SelfTestFailed.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return path.read_bytes()
    module = read_tenant(path, backbone, task=task)
    if not module.self_tests:
        module = replace(module, self_tests=self_tests(path, backbone, module))
    if dtype == "float32":
        return write_tenant(module)
    return write_tenant(_rounded(module, backbone), torch.bfloat16)


def to_own_file(module: TenantModule, backbone: Backbone, dtype: str = "float32") -> bytes:
    """A native file whose self-tests hold its own answers by the dense reference: of a module that no library wrote."""
    if dtype == "bfloat16":
        module = read_tenant_bytes(write_tenant(module, torch.bfloat16))
    tests = make_self_tests(backbone, module, Tokenizer.load(backbone.folder, backbone.config))
    data = write_tenant(replace(module, self_tests=tests), torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    check_native(data, backbone)
    return data


def check_native(data: bytes, backbone: Backbone) -> TenantHeader:
    """Every check that needs no memory budget: complete, finite, made for this backbone, inside its shapes.

    Raises CorruptFile, WrongBackbone.
    """
    header = parse_header(data)
    header.check(backbone.config, backbone.fingerprint, backbone.skip)
    tensors = load_tensors(data)
    if (layout := header.layouts.get("sparse")) is not None:
        columns, row_starts = tensors["delta.sparse.columns"], tensors["delta.sparse.row_starts"]
        check_sparse(layout, columns, row_starts, backbone.config)
    return header


def _rounded(module: TenantModule, backbone: Backbone) -> TenantModule:
    """The module in bfloat16 numbers, whose self-tests hold its own answers.

    Raises SelfTestFailed where these are further from the original's than serving in bfloat16 may be.
    """
    rounded = read_tenant_bytes(write_tenant(module, torch.bfloat16))
    tests = module.self_tests
    answers = [dense_forward(backbone, rounded, test.token_ids, test.type_ids, test.path) for test in tests]
    check_outputs(tests, answers, torch.bfloat16)
    exact = tuple(replace(test, expected=answer) for test, answer in zip(tests, answers, strict=True))
    return replace(rounded, self_tests=exact)
