"""What is in a checkpoint, what of it is honoured or refused, and its bytes: said before anything is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vbert.errors import VbertError
from vbert.formats import adapterhub_folder, adapterhub_head, peft_folder
from vbert.formats.tensors import is_set, malformed_is_corrupt, opened, read_json
from vbert.header import read_header
from vbert.layout import kind_of, pack
from vbert.tenant import Head, TenantModule

__all__ = ["describe_module", "inspect_checkpoint"]


def inspect_checkpoint(path: Path, format_name: str) -> dict[str, Any]:
    """Format, method, files, tensors, honoured options and refusals of a checkpoint, from its headers and configs."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    report: dict[str, Any] = {
        "format": format_name,
        "method": None,
        "bytes": sum(file.stat().st_size for file in files),
        "files": [file.name for file in files],
        "honoured": {},
        "refused": [],
    }
    try:
        with malformed_is_corrupt(path):
            report["tensors"], report["parameters"] = _count(files)
            report |= _DETAILS[format_name](path)
    except (VbertError, OSError) as error:
        report["refused"] = [str(error)]
    return report


def describe_module(module: TenantModule) -> dict[str, Any]:
    """Deltas by kind, head and resident bytes of a tenant that was read."""
    numbers = sum(data.numel() for _, data in pack(module.deltas).values())
    return {
        "deltas": dict(Counter(kind_of(delta) for delta in module.deltas)),
        "layers": sorted({delta.layer for delta in module.deltas}),
        "head": _describe_head(module.head),
        "module_bytes": {"float32": 4 * numbers, "bfloat16": 2 * numbers},
        "unused": list(module.source.get("unused", [])),
    }


def _describe_head(head: Head) -> dict[str, Any]:
    widths = [layer.weight.shape[0] for layer in head.layers]
    return {
        "kind": head.kind,
        "problem": None if head.kind == "embed" else head.problem,
        "labels": list(head.labels),
        "pooling": head.pooling,
        "shared_pooler": head.shared_pooler,
        "layer_widths": widths,
    }


def _count(files: Iterable[Path]) -> tuple[int, int]:
    tensors = parameters = 0
    for file in files:
        with opened(file) as header:
            for key in header.keys():  # noqa: SIM118
                size = 1
                for side in header.get_slice(key).get_shape():
                    size *= side
                tensors, parameters = tensors + 1, parameters + size
    return tensors, parameters


def _peft(path: Path) -> dict[str, Any]:
    config = read_json(path / peft_folder.CONFIG_FILE)
    method = str(config.get("peft_type"))
    return {
        "method": method,
        "honoured": _chosen(config, peft_folder.HONOURED.get(method, set())),
        "refused": [str(refusal) for refusal in peft_folder.refusals(config)],
    }


def _adapters(path: Path) -> dict[str, Any]:
    stated = read_json(path / adapterhub_folder.CONFIG_FILE)
    hooked = (path / adapterhub_folder.INTERFACE_FILE).is_file()
    refused = [str(refusal) for refusal in adapterhub_folder.refusals(stated, hooked=hooked)]
    if (path / adapterhub_head.HEAD_FILE).is_file():
        try:
            adapterhub_head.check_head_config(read_json(path / adapterhub_head.HEAD_FILE))
        except VbertError as error:
            refused.append(str(error))
    config = stated.get("config")
    known = isinstance(config, dict)
    return {
        "method": adapterhub_folder.method(config) if known else None,
        "honoured": _chosen(config, adapterhub_folder.HONOURED) if known else {},
        "refused": refused,
    }


def _transformers(path: Path) -> dict[str, Any]:
    config = read_json(path / "config.json")
    return {"method": str((config.get("architectures") or [None])[0])}


def _native(path: Path) -> dict[str, Any]:
    header = read_header(path)
    honoured = {"kinds": list(header.kinds), "max_length": header.max_length, "self_tests": header.num_self_tests}
    return {
        "method": header.source.get("method"),
        "honoured": honoured | {"source": dict(header.source)},
        "head": _describe_head(header.head) | {"layer_widths": [out for out, _ in header.layer_shapes]},
        "fingerprint": header.fingerprint,
    }


def _chosen(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: config[key] for key in sorted(keys) if is_set(config.get(key))}


_DETAILS = {"peft": _peft, "adapters": _adapters, "transformers": _transformers, "native": _native}
