"""Checkpoint formats: whatever the ecosystem writes, read into a `Backbone` or a `TenantModule`.

`read_tenant` finds out which format a path is. Each format has its own module; nothing is ever unpickled.
"""

from __future__ import annotations

from pathlib import Path

from vbert.errors import RefusedCheckpoint
from vbert.formats.adapterhub_folder import read_adapterhub_folder
from vbert.formats.peft_folder import CONFIG_FILE, read_peft_folder
from vbert.formats.tensors import read_json
from vbert.formats.transformers_folder import Backbone, fingerprint, read_backbone
from vbert.formats.transformers_head import read_transformers_head
from vbert.tenant import HEAD_KINDS, TenantModule

__all__ = ["Backbone", "fingerprint", "read_backbone", "read_tenant"]


def read_tenant(path: Path | str, backbone: Backbone, *, task: str | None = None) -> TenantModule:
    """Read any tenant checkpoint.

    Args: task: a head kind ("classify", "token_classify", "embed", "rerank") where the checkpoint leaves it open.
    Raises: RefusedCheckpoint naming what cannot be honoured; CorruptFile for a damaged file.
    """
    path = Path(path)
    if task is not None and task not in HEAD_KINDS:
        raise RefusedCheckpoint(f"task {task!r} is unknown; one of {', '.join(HEAD_KINDS)} is served", param="task")
    if (path / CONFIG_FILE).is_file():
        read = read_peft_folder if "peft_type" in read_json(path / CONFIG_FILE) else read_adapterhub_folder
        return read(path, backbone, task)
    return read_transformers_head(path, backbone, task)
