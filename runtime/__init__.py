"""When and where it runs: requests, tenants, batches, streams. No model maths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.blocking import BlockingEngine
    from runtime.config import EngineConfig
    from runtime.engine import Engine

__all__ = ["BlockingEngine", "Engine", "EngineConfig"]

_HOMES = {"BlockingEngine": "runtime.blocking", "Engine": "runtime.engine", "EngineConfig": "runtime.config"}


def __getattr__(name: str) -> Any:
    """Imported at first use: the command line reads EngineConfig without waiting seconds for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
