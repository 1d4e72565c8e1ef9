"""What a native tenant file says of itself: its safetensors table and its metadata, checked before anything is used.

The file as a whole is the business of vbert/checkpoint.py; this module reads no numbers of any tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from vbert.config import ACTIVATIONS, EncoderConfig
from vbert.errors import CorruptFile, WrongBackbone
from vbert.layout import SlotLayout
from vbert.skip import Skip, usable_paths
from vbert.tenant import HEAD_KINDS, PATHS, Dense, Exit, Head

__all__ = ["AGAIN", "FORMAT_VERSION", "StoredTensor", "TenantHeader", "parse_header", "read_header"]

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 4 * 2**20
MAX_LABELS = 100_000
_MAX_SELF_TESTS = 256
_FIRST_READ = 16 * 1024  # bytes; holds most headers
_POOLINGS = ("cls", "mean", "none")
_PROBLEMS = ("single_label", "multi_label", "regression")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I32": torch.int32, "I64": torch.int64}
_DELTA_DTYPES = (torch.float32, torch.bfloat16)
AGAIN = "convert or upload the tenant again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a native file; `begin` is where its bytes start in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantHeader:
    """What a native file says of itself, without its numbers. `head` has no layers; `num_bytes` is the whole file.

    data_begin: where the tensors start; key: SHA-256 of the bytes before it. dtype: of the stored deltas. paths,
    skip_fingerprint, exits, exit_threshold: as in TenantModule, but that exits have no numbers; exit_shapes: of each.
    self_test_paths, self_test_exits: of each self-test.
    """

    fingerprint: str
    head: Head
    layer_shapes: tuple[tuple[int, int], ...]  # (out, in) of each dense layer of the head
    layouts: Mapping[str, SlotLayout]
    tensors: Mapping[str, StoredTensor]
    data_begin: int
    key: str
    max_length: int | None
    self_test_paths: tuple[str, ...]
    paths: tuple[str, ...]
    skip_fingerprint: str
    exits: tuple[Exit, ...]
    exit_shapes: tuple[tuple[tuple[int, int], ...], ...]
    exit_threshold: float
    self_test_exits: tuple[int, ...]
    source: Mapping[str, Any]
    num_bytes: int

    @property
    def task(self) -> str:
        return self.head.kind

    @property
    def dtype(self) -> torch.dtype:
        stored = (self.tensors.get(f"delta.{kind}") for kind in self.layouts)
        return next((tensor.dtype for tensor in stored if tensor is not None), torch.float32)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.layouts)

    @property
    def is_whole(self) -> bool:
        """Whether the tenant has an encoder of its own."""
        return "weights" in self.layouts

    @property
    def lowest_layer(self) -> int | None:
        """The lowest layer that has a delta, or an exit before it; None for a tenant that is a head only."""
        changed = {entry.layer for layout in self.layouts.values() for entry in layout.entries}
        return min(changed | {each.layer for each in self.exits}, default=None)

    @property
    def num_self_tests(self) -> int:
        return len(self.self_test_paths)

    def paths_on(self, skip: Skip | None) -> tuple[str, ...]:
        """Which of its paths there are on a backbone with this skip part."""
        return usable_paths(self.paths, self.skip_fingerprint, skip)

    def check(
        self, config: EncoderConfig, fingerprint: str, skip: Skip | None = None, known: Container[str] = ()
    ) -> None:
        """Raise WrongBackbone or CorruptFile when this tenant cannot run on that backbone. known: keys of layouts that
        were checked before."""
        ours = [fingerprint] if skip is None else [fingerprint, skip.fingerprint]
        if self.fingerprint not in ours:
            raise WrongBackbone(
                f"the tenant was made for backbone {self.fingerprint[:23]}, this one is "
                f"{' or '.join(each[:23] for each in ours)}; convert or train it again with this backbone"
            )
        if not (paths := self.paths_on(skip)):
            raise WrongBackbone(
                f"the tenant was trained for the path {' or '.join(self.paths)}, which this backbone does not have; "
                "train it on this backbone"
            )
        lowest = self.lowest_layer
        if paths != ("plain",) and skip is not None and lowest is not None and lowest < skip.config.first_layer:
            raise CorruptFile(
                f"a tenant that skips layers below {skip.config.first_layer} has a delta, or an exit, in layer "
                f"{lowest}; train it with those from layer {skip.config.first_layer} on"
            )
        if self.is_whole and len(self.layouts) > 1:
            raise CorruptFile(f"whole weights beside deltas of kind {', '.join(self.layouts)}; fold those in; {AGAIN}")
        for layout in self.layouts.values():
            if layout.key not in known:
                layout.check(config)
        if self.exits and self.exits[-1].layer >= config.num_layers:
            raise CorruptFile(f"an exit stands before layer {self.exits[-1].layer}; there are {config.num_layers}")
        if self.head.shared_pooler and not config.has_pooler:
            raise CorruptFile(
                "the head uses the backbone's pooler, and this backbone has none; store the pooler with it"
            )
        for shapes in (self.layer_shapes, *self.exit_shapes):
            width = config.hidden_size
            for out_width, in_width in shapes:
                if in_width != width:
                    raise CorruptFile(f"a head layer takes {in_width} numbers where {width} come in; {AGAIN}")
                width = out_width
        if self.max_length is not None and not 2 < self.max_length <= config.max_length:
            raise CorruptFile(f"max_length {self.max_length} is outside 3..{config.max_length}; {AGAIN}")


def read_header(path: str | os.PathLike[str]) -> TenantHeader:
    """The header of a native file on disk; reads no tensor data. Raises CorruptFile, FileNotFoundError."""
    with Path(path).open("rb", buffering=0) as file:
        data = file.read(_FIRST_READ)
        header_bytes = min(int.from_bytes(data[:8], "little"), MAX_HEADER_BYTES)
        while len(data) < 8 + header_bytes and (more := file.read(8 + header_bytes - len(data))):
            data += more
        return parse_header(data, os.fstat(file.fileno()).st_size)


def parse_header(data: bytes, num_bytes: int | None = None) -> TenantHeader:
    """The header of a native file from its first bytes; `num_bytes` is the size of the whole file (default len(data)).

    Raises CorruptFile for anything that is not a complete native file of this format version.
    """
    num_bytes = len(data) if num_bytes is None else num_bytes
    table, meta, data_begin = _safetensors_table(data, num_bytes)
    if not isinstance(meta, dict) or "vbert" not in meta:
        raise CorruptFile("the safetensors file is not a native tenant file (no vbert metadata); convert it first")
    try:
        fields = json.loads(meta["vbert"])
        if fields["version"] != FORMAT_VERSION:
            raise CorruptFile(f"format version {fields['version']} is not {FORMAT_VERSION}; convert the tenant again")
        head = _head_from_json(fields["head"])
        exits = _exits(fields.get("exits", []), head)
        header = TenantHeader(
            fingerprint=str(fields["backbone_fingerprint"]),
            head=head,
            layer_shapes=_layer_shapes("head", head, table),
            layouts={kind: SlotLayout.from_json(kind, rows) for kind, rows in fields["layouts"].items()},
            tensors=table,
            data_begin=data_begin,
            key=hashlib.sha256(data[:data_begin]).hexdigest(),
            max_length=None if fields["max_length"] is None else int(fields["max_length"]),
            self_test_paths=_self_test_paths(fields),
            paths=_paths(fields.get("paths", ["plain"])),
            skip_fingerprint=str(fields.get("skip_fingerprint", "")),
            exits=exits,
            exit_shapes=tuple(_layer_shapes(f"exit.{each.layer}", each.head, table) for each in exits),
            exit_threshold=_threshold(fields.get("exit_threshold", 1.0)),
            self_test_exits=_self_test_exits(fields, exits),
            source=dict(fields["source"]),
            num_bytes=num_bytes,
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptFile(f"the tenant file's metadata is malformed ({error!r}); {AGAIN}") from error
    _check_tensor_table(header)
    return header


def _paths(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not names or any(name not in PATHS for name in names):
        raise CorruptFile(f"the paths are {names!r}; some of {', '.join(PATHS)} are read")
    return tuple(path for path in PATHS if path in names)


def _self_test_paths(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """One for each self-test. Raises CorruptFile."""
    count = int(fields["num_self_tests"])
    if not 0 <= count <= _MAX_SELF_TESTS:
        raise CorruptFile(f"{count} self-tests; between 0 and {_MAX_SELF_TESTS} are allowed")
    paths = fields.get("self_test_paths", ["plain"] * count)
    allowed = _paths(fields.get("paths", ["plain"]))
    if not isinstance(paths, list) or len(paths) != count or any(path not in allowed for path in paths):
        raise CorruptFile(f"the self-tests are of the paths {paths!r}, the tenant has {', '.join(allowed)}; {AGAIN}")
    return tuple(paths)


def _exits(items: Any, head: Head) -> tuple[Exit, ...]:
    """Without their numbers, as the head. Raises CorruptFile."""
    exits = tuple(
        Exit(layer=int(item["layer"]), head=replace(head, shared_pooler=False, layers=_empty_layers(item)))
        for item in items
    )
    layers = [each.layer for each in exits]
    if layers != sorted(set(layers)) or min(layers, default=1) < 1:
        raise CorruptFile(f"the exits stand before the layers {layers}; ascending ones from 1 on are read")
    if exits and (head.kind != "classify" or head.problem == "regression"):
        raise CorruptFile(f"a {head.kind} head of problem {head.problem} has no confidence to leave early by; {AGAIN}")
    return exits


def _threshold(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise CorruptFile(f"the exit threshold is {value!r}; a confidence from 0 to 1 is read")
    return float(value)


def _self_test_exits(fields: Mapping[str, Any], exits: tuple[Exit, ...]) -> tuple[int, ...]:
    """One for each self-test. Raises CorruptFile."""
    count = int(fields["num_self_tests"])
    layers = fields.get("self_test_exits", [0] * count)
    if not isinstance(layers, list) or len(layers) != count or not {*layers} <= {0, *(each.layer for each in exits)}:
        raise CorruptFile(f"the self-tests are of the exits {layers!r}; give one for each, 0 for the head; {AGAIN}")
    return tuple(layers)


def _head_from_json(fields: Mapping[str, Any]) -> Head:
    """The head without its numbers: each layer is an empty Dense that only carries the activation."""
    for name, allowed in (("kind", HEAD_KINDS), ("pooling", _POOLINGS), ("problem", _PROBLEMS)):
        if fields[name] not in allowed:
            raise CorruptFile(f"head {name} {fields[name]!r} is unknown; one of {', '.join(allowed)} is read")
    labels = tuple(fields["labels"])
    if len(labels) > MAX_LABELS or not all(isinstance(label, str) for label in labels):
        raise CorruptFile(f"labels must be at most {MAX_LABELS} strings; there are {len(labels)}")
    return Head(
        kind=fields["kind"],
        pooling=fields["pooling"],
        shared_pooler=bool(fields["shared_pooler"]),
        layers=_empty_layers(fields),
        problem=fields["problem"],
        labels=labels,
        normalise=bool(fields["normalise"]),
    )


def _empty_layers(fields: Mapping[str, Any]) -> tuple[Dense, ...]:
    if bad := [a for a in fields["activations"] if a not in ACTIVATIONS]:
        raise CorruptFile(f"head activation {bad[0]!r} is unknown; one of {', '.join(ACTIVATIONS)} is read")
    return tuple(Dense(weight=torch.empty(0), bias=None, activation=a) for a in fields["activations"])


def _layer_shapes(name: str, head: Head, table: Mapping[str, StoredTensor]) -> tuple[tuple[int, int], ...]:
    shapes = tuple(table[f"{name}.{i}.weight"].shape for i in range(len(head.layers)))
    if any(len(shape) != 2 for shape in shapes):
        raise CorruptFile(f"head weights have shapes {shapes}; each must be [out, in]; {AGAIN}")
    return cast("tuple[tuple[int, int], ...]", shapes)


def _safetensors_table(data: bytes, num_bytes: int) -> tuple[dict[str, StoredTensor], Any, int]:
    """Tensors by name, the metadata, and where the data begins, after checking that the file is whole."""
    header_bytes = int.from_bytes(data[:8], "little") if len(data) >= 8 else -1
    if not 2 <= header_bytes <= MAX_HEADER_BYTES or len(data) < 8 + header_bytes:
        raise CorruptFile(
            f"{num_bytes} bytes are not a whole safetensors file (header of {header_bytes} bytes); {AGAIN}"
        )
    begin = 8 + header_bytes
    try:
        raw = json.loads(data[8:begin])
        meta = raw.pop("__metadata__", {})
        table = {name: _stored_tensor(name, fields, begin) for name, fields in raw.items()}
    except (UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise CorruptFile(f"the safetensors header is malformed ({error!r}); {AGAIN}") from error
    end = begin
    for name, tensor in sorted(table.items(), key=lambda item: item[1].begin):
        if tensor.begin != end:
            raise CorruptFile(f"tensor {name!r} begins at byte {tensor.begin}, the one before ends at {end}; {AGAIN}")
        end += tensor.num_bytes
    if num_bytes != end:
        raise CorruptFile(f"the file has {num_bytes} bytes where its header promises {end}; {AGAIN}")
    return table, meta, begin


def _stored_tensor(name: str, fields: Mapping[str, Any], data_begin: int) -> StoredTensor:
    shape = tuple(int(n) for n in fields["shape"])
    if fields["dtype"] not in _DTYPES or min(shape, default=0) < 0:
        raise CorruptFile(f"tensor {name!r} is {fields['dtype']} {shape}; one of {', '.join(_DTYPES)} is read")
    tensor = StoredTensor(_DTYPES[fields["dtype"]], shape, data_begin + int(fields["data_offsets"][0]))
    if int(fields["data_offsets"][1]) - int(fields["data_offsets"][0]) != tensor.num_bytes:
        raise CorruptFile(f"tensor {name!r} has {fields['data_offsets']} for {tensor.num_bytes} bytes; {AGAIN}")
    return tensor


def _check_tensor_table(header: TenantHeader) -> None:
    """Every tensor the metadata promises is there with its dtype and shape, and there is no other one."""
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...] | None]] = {}
    if header.dtype not in _DELTA_DTYPES:
        raise CorruptFile(f"the deltas are stored in {header.dtype}; torch.float32 or torch.bfloat16 is read")
    for kind, layout in header.layouts.items():
        wanted[f"delta.{kind}"] = (header.dtype, (layout.numel,))
        if kind == "sparse":
            wanted["delta.sparse.columns"] = (torch.int32, (layout.numel,))
            num_starts = sum(int(e.variant) + 1 for e in layout.entries)
            wanted["delta.sparse.row_starts"] = (torch.int32, (num_starts,))
    heads = {"head": header.layer_shapes}
    heads |= {f"exit.{each.layer}": shapes for each, shapes in zip(header.exits, header.exit_shapes, strict=True)}
    for name, shapes in heads.items():
        for i, (out_width, in_width) in enumerate(shapes):
            wanted[f"{name}.{i}.weight"] = (torch.float32, (out_width, in_width))
            if f"{name}.{i}.bias" in header.tensors:
                wanted[f"{name}.{i}.bias"] = (torch.float32, (out_width,))
    for i in range(header.num_self_tests):
        wanted |= {f"self_test.{i}.token_ids": (torch.int64, None), f"self_test.{i}.type_ids": (torch.int64, None)}
        wanted[f"self_test.{i}.expected"] = (torch.float32, None)
    if extra := sorted(set(header.tensors) - set(wanted)):
        raise CorruptFile(f"the file holds a tensor {extra[0]!r} that its metadata does not explain; {AGAIN}")
    for name, (dtype, shape) in wanted.items():
        found = header.tensors.get(name)
        if found is None or found.dtype != dtype or (shape is not None and found.shape != shape):
            raise CorruptFile(f"tensor {name!r} is {found}, the metadata promises {dtype} {shape}; {AGAIN}")
    for i in range(header.num_self_tests):
        ids, types = (header.tensors[f"self_test.{i}.{part}"].shape for part in ("token_ids", "type_ids"))
        if len(ids) != 1 or not ids[0] or types != ids:
            raise CorruptFile(f"self-test {i} has token ids {list(ids)} and type ids {list(types)}; {AGAIN}")
    head, labels = header.head, len(header.head.labels)
    for shapes in heads.values() if head.kind != "embed" else ():
        if not shapes or shapes[-1][0] != labels or not labels:
            raise CorruptFile(f"a head has {labels} labels and layers {shapes}; one output a label is needed")
    if (head.kind == "token_classify") != (head.pooling == "none"):
        raise CorruptFile(f"a {head.kind} head cannot have pooling {head.pooling!r}; {AGAIN}")
    if head.kind == "rerank" and labels != 1:
        raise CorruptFile(f"a rerank head has one output; this one has {labels}")
