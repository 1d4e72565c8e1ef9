"""The native tenant file: one safetensors file whose data is the slot layout. Written by training and by imports.

Tensors: `delta.<kind>` [numel] float32, the flat slot of each kind; for sparse also `delta.sparse.columns` [numel] and
`delta.sparse.row_starts`; `head.<i>.weight|bias`; `self_test.<i>.token_ids|type_ids|expected`. Everything else is
JSON in the safetensors metadata. Nothing is ever unpickled, and no field of the file is trusted: sizes, names and
numbers are checked before anything is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from vbert.config import ACTIVATIONS, EncoderConfig
from vbert.errors import CorruptFile, WrongBackbone
from vbert.layout import SlotLayout, pack, unpack
from vbert.tenant import HEAD_KINDS, Dense, Head, SelfTest, Sparse, TenantModule

__all__ = ["FORMAT_VERSION", "TenantHeader", "parse_header", "read_header", "read_tenant_bytes", "write_tenant"]

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 4 * 2**20
MAX_LABELS = 100_000
_POOLINGS = ("cls", "mean", "none")
_PROBLEMS = ("single_label", "multi_label", "regression")
_DTYPES = {"F32": 4, "I32": 4, "I64": 8}
_AGAIN = "convert or upload the tenant again"


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantHeader:
    """What a native file says of itself, without its numbers. `head` has no layers; `num_bytes` is the whole file."""

    fingerprint: str
    head: Head
    layer_shapes: tuple[tuple[int, int], ...]  # (out, in) of each dense layer of the head
    layouts: Mapping[str, SlotLayout]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)
    max_length: int | None
    num_self_tests: int
    source: Mapping[str, Any]
    num_bytes: int

    @property
    def task(self) -> str:
        return self.head.kind

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.layouts)

    @property
    def lowest_layer(self) -> int | None:
        """The lowest layer that has a delta; None for a tenant that is a head only."""
        return min((e.layer for layout in self.layouts.values() for e in layout.entries), default=None)

    def check(self, config: EncoderConfig, fingerprint: str) -> None:
        """Raise WrongBackbone or CorruptFile when this tenant cannot run on that backbone."""
        if self.fingerprint != fingerprint:
            raise WrongBackbone(
                f"the tenant was made for backbone {self.fingerprint[:23]}, this one is {fingerprint[:23]}; "
                "convert or train it again with this backbone"
            )
        for layout in self.layouts.values():
            layout.check(config)
        width = config.hidden_size
        if self.head.shared_pooler and not config.has_pooler:
            raise CorruptFile(
                "the head uses the backbone's pooler, and this backbone has none; store the pooler with it"
            )
        for out_width, in_width in self.layer_shapes:
            if in_width != width:
                raise CorruptFile(f"a head layer takes {in_width} numbers where {width} come in; {_AGAIN}")
            width = out_width
        if self.max_length is not None and not 2 < self.max_length <= config.max_length:
            raise CorruptFile(f"max_length {self.max_length} is outside 3..{config.max_length}; {_AGAIN}")


def write_tenant(module: TenantModule) -> bytes:
    """The native file of a tenant, the same bytes for the same module. Raises CorruptFile if a number is not finite."""
    tensors: dict[str, Tensor] = {}
    packed = pack(module.deltas)
    for kind, (layout, data) in packed.items():
        tensors[f"delta.{kind}"] = data
        if kind == "sparse":
            tensors |= _sparse_integers(layout, [d for d in module.deltas if isinstance(d, Sparse)])
    for i, layer in enumerate(module.head.layers):
        tensors[f"head.{i}.weight"] = layer.weight.detach().to(torch.float32).contiguous()
        if layer.bias is not None:
            tensors[f"head.{i}.bias"] = layer.bias.detach().to(torch.float32).contiguous()
    for i, test in enumerate(module.self_tests):
        tensors[f"self_test.{i}.token_ids"] = test.token_ids.to(torch.int64)
        tensors[f"self_test.{i}.type_ids"] = test.type_ids.to(torch.int64)
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
    return save_safetensors(tensors, metadata={"vbert": json.dumps(meta, sort_keys=True, separators=(",", ":"))})


def read_header(path: str | os.PathLike[str]) -> TenantHeader:
    """The header of a native file on disk; reads no tensor data. Raises CorruptFile, FileNotFoundError."""
    with Path(path).open("rb") as file:
        return parse_header(file.read(8 + MAX_HEADER_BYTES), file.seek(0, os.SEEK_END))


def parse_header(data: bytes, num_bytes: int | None = None) -> TenantHeader:
    """The header of a native file from its first bytes; `num_bytes` is the size of the whole file (default len(data)).

    Raises CorruptFile for anything that is not a complete native file of this format version.
    """
    num_bytes = len(data) if num_bytes is None else num_bytes
    table = _safetensors_table(data, num_bytes)
    meta = table.pop("__metadata__", {})
    if not isinstance(meta, dict) or "vbert" not in meta:
        raise CorruptFile("the safetensors file is not a native tenant file (no vbert metadata); convert it first")
    try:
        fields = json.loads(meta["vbert"])
        if fields["version"] != FORMAT_VERSION:
            raise CorruptFile(f"format version {fields['version']} is not {FORMAT_VERSION}; convert the tenant again")
        header = TenantHeader(
            fingerprint=str(fields["backbone_fingerprint"]),
            head=_head_from_json(fields["head"]),
            layer_shapes=_layer_shapes(fields["head"], table),
            layouts={kind: SlotLayout.from_json(kind, rows) for kind, rows in fields["layouts"].items()},
            tensors=table,
            max_length=None if fields["max_length"] is None else int(fields["max_length"]),
            num_self_tests=int(fields["num_self_tests"]),
            source=dict(fields["source"]),
            num_bytes=num_bytes,
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptFile(f"the tenant file's metadata is malformed ({error!r}); {_AGAIN}") from error
    _check_tensor_table(header)
    return header


def read_tenant_bytes(data: bytes) -> TenantModule:
    """A native file, read and checked whole. Raises CorruptFile (truncated, malformed, a number not finite)."""
    header = parse_header(data)
    tensors = load_tensors(data)
    deltas = tuple(
        delta
        for kind, layout in header.layouts.items()
        for delta in unpack(
            layout,
            tensors[f"delta.{kind}"],
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
        source=dict(header.source),
    )


def load_tensors(data: bytes) -> dict[str, Tensor]:
    """All tensors of a native file's bytes, checked to be finite and, for sparse, inside the matrix."""
    try:
        tensors = load_safetensors(data)
    except SafetensorError as error:
        raise CorruptFile(f"the tenant file is not valid safetensors ({error}); {_AGAIN}") from error
    _check_finite(tensors)
    return tensors


def read_head(header: TenantHeader, tensors: Mapping[str, Tensor]) -> Head:
    """The head with its layers, as float32 tensors."""
    layers = tuple(
        Dense(weight=tensors[f"head.{i}.weight"], bias=tensors.get(f"head.{i}.bias"), activation=empty.activation)
        for i, empty in enumerate(header.head.layers)
    )
    head = header.head
    return Head(
        kind=head.kind,
        pooling=head.pooling,
        shared_pooler=head.shared_pooler,
        layers=layers,
        problem=head.problem,
        labels=head.labels,
        normalise=head.normalise,
    )


def read_self_tests(header: TenantHeader, tensors: Mapping[str, Tensor]) -> tuple[SelfTest, ...]:
    names = ("token_ids", "type_ids", "expected")
    return tuple(
        SelfTest(**{name: tensors[f"self_test.{i}.{name}"] for name in names}) for i in range(header.num_self_tests)
    )


def check_sparse(layout: SlotLayout, columns: Tensor, row_starts: Tensor, config: EncoderConfig) -> None:
    """Raise CorruptFile where the compressed rows of a sparse delta point outside their matrix."""
    cursor = 0
    for entry in layout.entries:
        rows = config.site_out(entry.site)
        starts = row_starts[cursor : cursor + rows + 1].to(torch.int64)
        cursor += rows + 1
        nnz = int(starts[-1]) if starts.numel() == rows + 1 else -1
        if int(starts[0]) != 0 or not 0 <= nnz <= entry.numel or bool((starts.diff() < 0).any()):
            raise CorruptFile(f"sparse at layer {entry.layer}, {entry.site}: row starts do not ascend; {_AGAIN}")
        used = columns[entry.offset : entry.offset + nnz]
        if nnz and not 0 <= int(used.min()) <= int(used.max()) < config.site_in(entry.site):
            raise CorruptFile(f"sparse at layer {entry.layer}, {entry.site}: a column is outside the matrix; {_AGAIN}")
    if cursor != row_starts.numel():
        raise CorruptFile(f"sparse: {row_starts.numel()} row starts where the layout has {cursor}; {_AGAIN}")


def _sparse_integers(layout: SlotLayout, deltas: list[Sparse]) -> dict[str, Tensor]:
    by_site = {(d.layer, d.site): d for d in deltas}
    columns = torch.zeros(layout.numel, dtype=torch.int32)
    starts = []
    for entry in layout.entries:
        delta = by_site[entry.layer, entry.site]
        columns[entry.offset : entry.offset + delta.columns.numel()] = delta.columns.to(torch.int32)
        starts.append(delta.row_starts.to(torch.int32))
    return {"delta.sparse.columns": columns, "delta.sparse.row_starts": torch.cat(starts)}


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


def _head_from_json(fields: Mapping[str, Any]) -> Head:
    """The head without its numbers: each layer is an empty Dense that only carries the activation."""
    for name, allowed in (("kind", HEAD_KINDS), ("pooling", _POOLINGS), ("problem", _PROBLEMS)):
        if fields[name] not in allowed:
            raise CorruptFile(f"head {name} {fields[name]!r} is unknown; one of {', '.join(allowed)} is read")
    if bad := [a for a in fields["activations"] if a not in ACTIVATIONS]:
        raise CorruptFile(f"head activation {bad[0]!r} is unknown; one of {', '.join(ACTIVATIONS)} is read")
    labels = tuple(fields["labels"])
    if len(labels) > MAX_LABELS or not all(isinstance(label, str) for label in labels):
        raise CorruptFile(f"labels must be at most {MAX_LABELS} strings; there are {len(labels)}")
    empty = torch.empty(0)
    return Head(
        kind=fields["kind"],
        pooling=fields["pooling"],
        shared_pooler=bool(fields["shared_pooler"]),
        layers=tuple(Dense(weight=empty, bias=None, activation=a) for a in fields["activations"]),
        problem=fields["problem"],
        labels=labels,
        normalise=bool(fields["normalise"]),
    )


def _layer_shapes(
    head: Mapping[str, Any], table: Mapping[str, tuple[str, tuple[int, ...]]]
) -> tuple[tuple[int, int], ...]:
    shapes = tuple(table[f"head.{i}.weight"][1] for i in range(len(head["activations"])))
    if any(len(shape) != 2 for shape in shapes):
        raise CorruptFile(f"head weights have shapes {shapes}; each must be [out, in]; {_AGAIN}")
    return cast("tuple[tuple[int, int], ...]", shapes)


def _safetensors_table(data: bytes, num_bytes: int) -> dict[str, Any]:
    """name -> (dtype, shape) and `__metadata__`, after checking that the file is whole."""
    header_bytes = int.from_bytes(data[:8], "little") if len(data) >= 8 else -1
    if not 2 <= header_bytes <= MAX_HEADER_BYTES or len(data) < 8 + header_bytes:
        raise CorruptFile(
            f"{num_bytes} bytes are not a whole safetensors file (header of {header_bytes} bytes); {_AGAIN}"
        )
    try:
        raw = json.loads(data[8 : 8 + header_bytes])
        ends = [t["data_offsets"][1] for name, t in raw.items() if name != "__metadata__"]
        table: dict[str, Any] = {
            name: t if name == "__metadata__" else (str(t["dtype"]), tuple(int(n) for n in t["shape"]))
            for name, t in raw.items()
        }
        expected = 8 + header_bytes + max(ends, default=0)
    except (UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise CorruptFile(f"the safetensors header is malformed ({error!r}); {_AGAIN}") from error
    if num_bytes != expected:
        raise CorruptFile(f"the file has {num_bytes} bytes where its header promises {expected}; {_AGAIN}")
    return table


def _check_tensor_table(header: TenantHeader) -> None:
    """Every tensor the metadata promises is there with its dtype and shape, and there is no other one."""
    wanted: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    for kind, layout in header.layouts.items():
        wanted[f"delta.{kind}"] = ("F32", (layout.numel,))
        if kind == "sparse":
            wanted["delta.sparse.columns"] = ("I32", (layout.numel,))
            wanted["delta.sparse.row_starts"] = ("I32", (sum(int(e.variant) + 1 for e in layout.entries),))
    for i, (out_width, in_width) in enumerate(header.layer_shapes):
        wanted[f"head.{i}.weight"] = ("F32", (out_width, in_width))
        if f"head.{i}.bias" in header.tensors:
            wanted[f"head.{i}.bias"] = ("F32", (out_width,))
    if header.num_self_tests < 0 or header.num_self_tests > 64:
        raise CorruptFile(f"{header.num_self_tests} self-tests; between 0 and 64 are allowed")
    for i in range(header.num_self_tests):
        wanted |= {f"self_test.{i}.token_ids": ("I64", None), f"self_test.{i}.type_ids": ("I64", None)}
        wanted[f"self_test.{i}.expected"] = ("F32", None)
    if extra := sorted(set(header.tensors) - set(wanted)):
        raise CorruptFile(f"the file holds a tensor {extra[0]!r} that its metadata does not explain; {_AGAIN}")
    for name, (dtype, shape) in wanted.items():
        found = header.tensors.get(name)
        if found is None or found[0] != dtype or (shape is not None and found[1] != shape):
            raise CorruptFile(f"tensor {name!r} is {found}, the metadata promises {(dtype, shape)}; {_AGAIN}")
    head, labels = header.head, len(header.head.labels)
    if head.kind != "embed" and (not header.layer_shapes or header.layer_shapes[-1][0] != labels or not labels):
        raise CorruptFile(
            f"the head has {labels} labels and layers {header.layer_shapes}; one output a label is needed"
        )
    if (head.kind == "token_classify") != (head.pooling == "none"):
        raise CorruptFile(f"a {head.kind} head cannot have pooling {head.pooling!r}; {_AGAIN}")
    if head.kind == "rerank" and labels != 1:
        raise CorruptFile(f"a rerank head has one output; this one has {labels}")


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CorruptFile(f"tensor {name!r} holds NaN or infinity; train or export the tenant again")
