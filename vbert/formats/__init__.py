"""Checkpoint formats: whatever the ecosystem writes, read into a `Backbone` or a `TenantModule`.

`read_tenant` finds out which format a path is and `inspect` says what is in it without raising for what is refused.
Each format has its own module; nothing is ever unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vbert.errors import RefusedCheckpoint, VbertError
from vbert.formats.adapterhub_folder import read_adapterhub_folder
from vbert.formats.inspection import describe_module, inspect_checkpoint
from vbert.formats.native import read_native
from vbert.formats.peft_folder import CONFIG_FILE, read_peft_folder
from vbert.formats.tensors import malformed_is_corrupt, read_json
from vbert.formats.transformers_folder import Backbone, fingerprint, read_backbone
from vbert.formats.transformers_head import read_transformers_head
from vbert.tenant import HEAD_KINDS, TenantModule

__all__ = ["Backbone", "fingerprint", "inspect", "locate_checkpoint", "read_backbone", "read_tenant"]

_READERS = {
    "native": read_native,
    "peft": read_peft_folder,
    "adapters": read_adapterhub_folder,
    "transformers": read_transformers_head,
}


def read_tenant(path: Path | str, backbone: Backbone, *, task: str | None = None) -> TenantModule:
    """Read any tenant checkpoint: a native file, or a folder of PEFT, AdapterHub or transformers.

    Args: task: a head kind ("classify", "token_classify", "embed", "rerank") where the checkpoint leaves it open.
    Raises: RefusedCheckpoint naming what cannot be honoured; CorruptFile for a damaged file; WrongBackbone.
    """
    if task is not None and task not in HEAD_KINDS:
        raise RefusedCheckpoint(f"task {task!r} is unknown; one of {', '.join(HEAD_KINDS)} is served", param="task")
    with malformed_is_corrupt(Path(path)):
        found, format_name = locate_checkpoint(Path(path))
        return _READERS[format_name](found, backbone, task)


def locate_checkpoint(path: Path) -> tuple[Path, str]:
    """The checkpoint at a path and its format. PEFT saves an adapter with a name of its own in a folder below.

    Raises: RefusedCheckpoint when no checkpoint is there, or several adapters are.
    """
    if path.is_file():
        return path, "native"
    if not path.is_dir():
        raise RefusedCheckpoint(f"{path} does not exist; give a checkpoint's folder or file")
    if (path / CONFIG_FILE).is_file():
        return path, "peft" if "peft_type" in read_json(path / CONFIG_FILE) else "adapters"
    if (path / "config.json").is_file():
        return path, "transformers"
    below = sorted(config.parent for config in path.glob(f"*/{CONFIG_FILE}"))
    if len(below) == 1:
        return locate_checkpoint(below[0])
    if below:
        names = ", ".join(folder.name for folder in below)
        raise RefusedCheckpoint(f"{path} holds several adapters ({names}); give the folder of one")
    raise RefusedCheckpoint(f"{path} holds no {CONFIG_FILE} and no config.json; give a checkpoint's folder or file")


def inspect(path: Path | str, backbone: Backbone | None = None, *, task: str | None = None) -> dict[str, Any]:
    """What is in a checkpoint: format, method, bytes, honoured options, refusals; with a backbone its deltas and head.

    Raises nothing for what is refused or broken: `refused` holds the messages, empty for a checkpoint that is served.
    """
    try:
        with malformed_is_corrupt(Path(path)):
            found, format_name = locate_checkpoint(Path(path))
    except VbertError as error:
        return {"format": None, "method": None, "bytes": 0, "files": [], "honoured": {}, "refused": [str(error)]}
    report = inspect_checkpoint(found, format_name)
    if backbone is None or report["refused"]:
        return report
    try:
        return report | describe_module(read_tenant(found, backbone, task=task))
    except VbertError as error:
        return report | {"refused": [str(error)]}
