"""Self-tests of a tenant: known inputs with the answers an independent implementation gave, and how near is the same.

The expected numbers never come from the served path. Trainers and importers store them in the native file; for a file
without any, `make_self_tests` lets the dense reference compute them at first load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from vbert.errors import CorruptFile, SelfTestFailed
from vbert.formats.transformers_folder import Backbone
from vbert.reference import dense_forward
from vbert.skip import own_paths, usable_paths
from vbert.tenant import SelfTest, TenantModule
from vbert.tokenizer import Tokenizer

__all__ = ["TOLERANCES", "Tolerance", "check_outputs", "dump_self_tests", "load_self_tests", "make_self_tests"]

_TEXTS = (
    "Please move 250 euros from my savings to my current account.",
    "The train to Zürich was 2 hours late; nobody said why!",
    "ok",
)
_PARTS = ("token_ids", "type_ids", "expected")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """|served - expected| <= absolute + relative * max |expected|, for every number of one answer."""

    absolute: float
    relative: float


# bfloat16 keeps 8 bits. Measured on minilm-l6, e5-12l and mpnet-base with tenants of every kind, as large as trained
# ones: the worst number of an answer was off by up to a third of this. A wrong module is off by its whole effect, so
# is a tenant too sensitive for bfloat16 (e5-12l with its LayerNorms replaced by random ones: 3 to 8 times this).
# float16 keeps 11 bits, an eighth of the error; not measured on a GPU yet, so it is given a quarter.
TOLERANCES = {
    torch.float32: Tolerance(1e-4, 1e-4),
    torch.float16: Tolerance(0.005, 0.015),
    torch.bfloat16: Tolerance(0.02, 0.06),
}


def make_self_tests(
    backbone: Backbone, module: TenantModule | None, tokenizer: Tokenizer, *, texts: Sequence[str] = _TEXTS
) -> tuple[SelfTest, ...]:
    """A few fixed texts with the dense reference's fp32 answers, of the bare backbone without a module, for each path
    and exit that there is.

    Slow: for threads that may block.
    """
    tests = []
    paths, exits = own_paths(backbone.skip), [0]
    if module is not None:
        exits += [each.layer for each in module.exits]
        paths = usable_paths(module.paths, module.skip_fingerprint, backbone.skip)
    max_length = (module and module.max_length) or backbone.config.max_length
    for encoded in tokenizer.encode(texts, max_length=max_length, offsets=False):
        token_ids, type_ids = torch.tensor(encoded.token_ids), torch.tensor(encoded.type_ids)
        for path in paths:
            for exit_layer in exits:
                expected = dense_forward(backbone, module, token_ids, type_ids, path, exit_layer)
                test = SelfTest(token_ids=token_ids, type_ids=type_ids, expected=expected, path=path, exit=exit_layer)
                tests.append(test)
    return tuple(tests)


def check_outputs(tests: Sequence[SelfTest], outputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Compare served outputs with the expected ones. Raises SelfTestFailed with the worst difference."""
    tolerance = TOLERANCES[dtype]
    for i, (test, output) in enumerate(zip(tests, outputs, strict=True)):
        if output.shape != test.expected.shape:
            raise SelfTestFailed(
                f"self-test {i} gave {tuple(output.shape)} numbers, stored are {tuple(test.expected.shape)}; "
                "add the tenant again"
            )
        limit = tolerance.absolute + tolerance.relative * float(test.expected.abs().max())
        worst = float((output - test.expected).abs().max())
        if not worst <= limit:  # also true when it is not a number
            raise SelfTestFailed(
                f"self-test {i} is off by {worst:.3g} where {limit:.3g} is allowed in {str(dtype).split('.')[-1]}; "
                "add the tenant again" + ("" if dtype == torch.float32 else ", or serve with dtype float32")
            )


def dump_self_tests(tests: Sequence[SelfTest]) -> bytes:
    """Safetensors bytes, for TenantStore.set_self_tests."""
    tensors = {f"{i}.{part}": getattr(test, part).clone() for i, test in enumerate(tests) for part in _PARTS}
    exits = " ".join(str(test.exit) for test in tests)
    return save_safetensors(tensors, {"paths": " ".join(test.path for test in tests), "exits": exits})


def load_self_tests(data: bytes) -> tuple[SelfTest, ...]:
    """Inverse of `dump_self_tests`. Raises CorruptFile."""
    try:
        tensors = load_safetensors(data)
        meta = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        paths = meta.get("paths", "").split() or ["plain"] * (len(tensors) // len(_PARTS))
        exits = [int(layer) for layer in meta.get("exits", "").split()] or [0] * len(paths)
        return tuple(_self_test(tensors, i, *way) for i, way in enumerate(zip(paths, exits, strict=True)))
    except (SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise CorruptFile(f"the stored self-tests are malformed ({error}); add the tenant again") from error


def _self_test(tensors: Mapping[str, Tensor], i: int, path: str, exit_layer: int) -> SelfTest:
    token_ids, type_ids, expected = (tensors[f"{i}.{part}"] for part in _PARTS)
    return SelfTest(token_ids=token_ids, type_ids=type_ids, expected=expected, path=path, exit=exit_layer)
