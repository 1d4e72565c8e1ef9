"""The error tree of everything that computes. Split by what the caller should do, not by where it happened.

    VbertError
    |-- BadRequest          fix the input and send it again
    |   |-- InputTooLong        more tokens than the backbone or the tenant takes
    |   |-- UnknownTenant       no tenant, version or backbone of that name
    |   |-- WrongTask           the tenant has no head for the method that was called
    |   `-- RefusedCheckpoint   a checkpoint asks for something that cannot be honoured
    |-- Overloaded          come back later (runtime/errors.py has the kinds)
    |-- ConfigError         fix the configuration
    |-- CorruptFile         a file is truncated, altered, not finite, or made for another backbone
    |   `-- WrongBackbone       the fingerprint in the file is not the one of the loaded backbone
    |-- SelfTestFailed      a tenant was loaded but does not give the numbers it was stored with
    |-- ShapeError          a tensor has another shape, dtype or layout than the operator takes
    `-- KernelUnavailable   the chosen backend does not exist on this machine

A message holds the value, the limit and what to change.
"""

from __future__ import annotations

__all__ = [
    "BadRequest",
    "ConfigError",
    "CorruptFile",
    "InputTooLong",
    "KernelUnavailable",
    "Overloaded",
    "RefusedCheckpoint",
    "SelfTestFailed",
    "ShapeError",
    "UnknownTenant",
    "VbertError",
    "WrongBackbone",
    "WrongTask",
]


class VbertError(Exception):
    """Root of all errors raised on purpose. `code` is stable and is what HTTP clients match on."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadRequest(VbertError):
    code = "bad_request"


class InputTooLong(BadRequest):
    code = "input_too_long"


class UnknownTenant(BadRequest):
    code = "unknown_tenant"


class WrongTask(BadRequest):
    code = "wrong_task"


class RefusedCheckpoint(BadRequest):
    code = "refused_checkpoint"


class Overloaded(VbertError):
    code = "overloaded"


class ConfigError(VbertError):
    code = "config_error"


class CorruptFile(VbertError):
    code = "corrupt_file"


class WrongBackbone(CorruptFile):
    code = "wrong_backbone"


class SelfTestFailed(VbertError):
    code = "self_test_failed"


class ShapeError(VbertError):
    code = "shape_error"


class KernelUnavailable(VbertError):
    code = "kernel_unavailable"
