"""Profiles on disk: one JSON file for one machine, backbone shape and software. Written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from runtime.cost import Conditions, CostModel
from vbert.errors import ConfigError, CorruptFile

__all__ = ["cache_folder", "make_folder", "profile_path", "read_profile", "write_profile"]


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where a user's profiles are: $XDG_CACHE_HOME/vbert, else ~/.cache/vbert. For `main` functions."""
    base = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME") or tempfile.gettempdir()) / ".cache"
    return Path(base) / "vbert"


def profile_path(folder: Path, conditions: Conditions) -> Path:
    """The name says what it was measured for, so that machines that share a folder do not share a profile."""
    text = json.dumps(asdict(conditions), sort_keys=True)
    shape = f"{conditions.layers}x{conditions.hidden}-{conditions.dtype}"
    return folder / f"profile-{shape}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def make_folder(folder: Path) -> None:
    """Make it if it is not there. Raises ConfigError when it cannot be made or written: before minutes of measuring."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be made ({error.strerror}); give another place") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"the folder {folder} cannot be written; change its rights, or give another place")


def read_profile(path: Path, here: Conditions | None = None) -> CostModel:
    """here: what it must hold for; None: any machine will do. Raises ConfigError (cannot be read, or measured
    elsewhere: all that differs is named), CorruptFile."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"the profile {path} cannot be read ({error.strerror}); run `vbert profile`") from error
    except ValueError as error:
        raise CorruptFile(f"the profile {path} is not JSON ({error}); run `vbert profile` again") from error
    model = CostModel.from_json(value)
    if here is not None:
        model.conditions.check(here, str(path))
    return model


def write_profile(path: Path, model: CostModel) -> None:
    """Write, flush, rename. Raises ConfigError when the folder cannot be written."""
    make_folder(path.parent)
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            try:
                json.dump(model.to_json(), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise ConfigError(f"the profile {path} cannot be written ({error.strerror}); give another place") from error
