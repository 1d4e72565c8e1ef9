"""The native tenant file: one safetensors file whose data is the slot layout. Written by training and by imports.

Tensors: `delta.<kind>` [numel], the flat slot of each kind, all float32 or all bfloat16; for sparse also
`delta.sparse.columns` [numel] and `delta.sparse.row_starts`; `head.<i>.weight|bias`; `exit.<layer>.<i>.weight|bias`;
`self_test.<i>.token_ids|type_ids|expected`. Everything else is JSON in the safetensors metadata. Nothing is ever
unpickled, and no field of the file is trusted: sizes, names and numbers are checked before anything is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from vbert.config import EncoderConfig
from vbert.errors import CorruptFile
from vbert.header import AGAIN, FORMAT_VERSION, TenantHeader, parse_header
from vbert.layout import SlotLayout, pack, unpack
from vbert.tenant import Dense, Exit, Head, SelfTest, Sparse, TenantModule

__all__ = [
    "check_sparse",
    "load_tensors",
    "read_exits",
    "read_head",
    "read_self_tests",
    "read_tenant_bytes",
    "write_tenant",
]


def write_tenant(module: TenantModule, dtype: torch.dtype = torch.float32) -> bytes:
    """The native file of a tenant, the same bytes for the same module. Raises CorruptFile if a number is not finite.

    dtype: the deltas are stored in, float32 or bfloat16; heads and self-tests are float32.
    """
    tensors: dict[str, Tensor] = {}
    packed = pack(module.deltas)
    for kind, (layout, data) in packed.items():
        tensors[f"delta.{kind}"] = data.to(dtype)
        if kind == "sparse":
            tensors |= _sparse_integers(layout, [d for d in module.deltas if isinstance(d, Sparse)])
    heads = {"head": module.head} | {f"exit.{each.layer}": each.head for each in module.exits}
    for name, head in heads.items():
        for i, layer in enumerate(head.layers):
            tensors[f"{name}.{i}.weight"] = layer.weight.detach().to(torch.float32).contiguous()
            if layer.bias is not None:
                tensors[f"{name}.{i}.bias"] = layer.bias.detach().to(torch.float32).contiguous()
    for i, test in enumerate(module.self_tests):
        tensors[f"self_test.{i}.token_ids"] = test.token_ids.to(torch.int64, copy=True)
        tensors[f"self_test.{i}.type_ids"] = test.type_ids.to(torch.int64, copy=True)
        tensors[f"self_test.{i}.expected"] = test.expected.detach().to(torch.float32).contiguous()
    _check_finite(tensors)
    meta = {
        "version": FORMAT_VERSION,
        "backbone_fingerprint": module.backbone_fingerprint,
        "layouts": {kind: layout.to_json() for kind, (layout, _) in packed.items()},
        "head": _head_json(module.head),
        "max_length": module.max_length,
        "num_self_tests": len(module.self_tests),
        "source": module.source,
    }
    if module.paths != ("plain",):
        meta |= {"paths": module.paths, "skip_fingerprint": module.skip_fingerprint}
        meta["self_test_paths"] = [test.path for test in module.self_tests]
    if module.exits:
        meta["exits"] = [
            {"layer": each.layer, "activations": [layer.activation for layer in each.head.layers]}
            for each in module.exits
        ]
        meta["exit_threshold"] = module.exit_threshold
        meta["self_test_exits"] = [test.exit for test in module.self_tests]
    return save_safetensors(tensors, metadata={"vbert": json.dumps(meta, sort_keys=True, separators=(",", ":"))})


def read_tenant_bytes(data: bytes) -> TenantModule:
    """A native file, read and checked whole. Raises CorruptFile (truncated, malformed, a number not finite)."""
    header = parse_header(data)
    tensors = load_tensors(data)
    deltas = tuple(
        delta
        for kind, layout in header.layouts.items()
        for delta in unpack(
            layout,
            tensors[f"delta.{kind}"].float(),
            tensors.get("delta.sparse.columns"),
            tensors.get("delta.sparse.row_starts"),
        )
    )
    return TenantModule(
        backbone_fingerprint=header.fingerprint,
        deltas=deltas,
        head=read_head(header, tensors),
        max_length=header.max_length,
        self_tests=read_self_tests(header, tensors),
        paths=header.paths,
        skip_fingerprint=header.skip_fingerprint,
        exits=read_exits(header, tensors),
        exit_threshold=header.exit_threshold,
        source=dict(header.source),
    )


def load_tensors(data: bytes) -> dict[str, Tensor]:
    """All tensors of a native file's bytes, checked to be finite and, for sparse, inside the matrix."""
    try:
        tensors = load_safetensors(data)
    except SafetensorError as error:
        raise CorruptFile(f"the tenant file is not valid safetensors ({error}); {AGAIN}") from error
    _check_finite(tensors)
    return tensors


def read_head(header: TenantHeader, tensors: Mapping[str, Tensor]) -> Head:
    """The head with its layers, as float32 tensors."""
    return _filled(header.head, "head", tensors)


def read_exits(header: TenantHeader, tensors: Mapping[str, Tensor]) -> tuple[Exit, ...]:
    return tuple(replace(each, head=_filled(each.head, f"exit.{each.layer}", tensors)) for each in header.exits)


def read_self_tests(header: TenantHeader, tensors: Mapping[str, Tensor]) -> tuple[SelfTest, ...]:
    names = ("token_ids", "type_ids", "expected")
    return tuple(
        SelfTest(**{name: tensors[f"self_test.{i}.{name}"] for name in names}, path=path, exit=exit_layer)
        for i, (path, exit_layer) in enumerate(zip(header.self_test_paths, header.self_test_exits, strict=True))
    )


def check_sparse(layout: SlotLayout, columns: Tensor, row_starts: Tensor, config: EncoderConfig) -> None:
    """Raise CorruptFile where the compressed rows of a sparse delta point outside their matrix."""
    starts = row_starts.numpy()
    ends = np.cumsum([config.site_out(entry.site) + 1 for entry in layout.entries])
    if ends[-1] != len(starts):
        raise CorruptFile(f"sparse: {len(starts)} row starts where the layout has {ends[-1]}; {AGAIN}")
    falls = np.flatnonzero(starts[1:] < starts[:-1]) + 1  # also where the next entry begins again at 0
    falls = falls[~np.isin(falls, ends)]
    unsigned = columns.numpy().view(np.uint32)  # a negative column is a very large one
    begin = 0
    for entry, end in zip(layout.entries, ends.tolist(), strict=True):
        where, count = f"sparse at layer {entry.layer}, {entry.site}", int(starts[end - 1])
        if starts[begin] != 0 or not 0 <= count <= entry.numel or ((falls >= begin) & (falls < end)).any():
            raise CorruptFile(f"{where}: row starts do not ascend; {AGAIN}")
        used = unsigned[entry.offset : entry.offset + count]
        if count and int(used.max()) >= config.site_in(entry.site):
            raise CorruptFile(f"{where}: a column is outside the matrix; {AGAIN}")
        begin = end


def _sparse_integers(layout: SlotLayout, deltas: list[Sparse]) -> dict[str, Tensor]:
    by_site = {(d.layer, d.site): d for d in deltas}
    columns = torch.zeros(layout.numel, dtype=torch.int32)
    starts = []
    for entry in layout.entries:
        delta = by_site[entry.layer, entry.site]
        columns[entry.offset : entry.offset + delta.columns.numel()] = delta.columns.to(torch.int32)
        starts.append(delta.row_starts.to(torch.int32))
    return {"delta.sparse.columns": columns, "delta.sparse.row_starts": torch.cat(starts)}


def _filled(head: Head, name: str, tensors: Mapping[str, Tensor]) -> Head:
    """The head with its numbers, which are under that name."""
    layers = tuple(
        Dense(weight=tensors[f"{name}.{i}.weight"], bias=tensors.get(f"{name}.{i}.bias"), activation=empty.activation)
        for i, empty in enumerate(head.layers)
    )
    return replace(head, layers=layers)


def _head_json(head: Head) -> dict[str, Any]:
    return {
        "kind": head.kind,
        "pooling": head.pooling,
        "shared_pooler": head.shared_pooler,
        "activations": [layer.activation for layer in head.layers],
        "problem": head.problem,
        "labels": list(head.labels),
        "normalise": head.normalise,
    }


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        # a sum is finite if all numbers are, short of an overflow, and far cheaper
        if not tensor.is_floating_point() or math.isfinite(float(tensor.sum(dtype=torch.float32))):
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise CorruptFile(f"tensor {name!r} holds NaN or infinity; train or export the tenant again")
