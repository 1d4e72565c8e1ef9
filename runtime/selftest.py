"""First load of a module: its self-tests are found or made, replayed through the compute lane, and compared."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.store import TenantStore
from vbert.arena import ResidentTenant
from vbert.checkpoint import read_tenant_bytes
from vbert.errors import VbertError
from vbert.formats.transformers_folder import Backbone
from vbert.model import SequenceInput
from vbert.selftest import check_outputs, dump_self_tests, load_self_tests, make_self_tests
from vbert.tenant import SelfTest
from vbert.tokenizer import Tokenizer

__all__ = ["SelfTester"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTester:
    """`verify` is what the manager asks for. replay: a batch of its own on the compute lane."""

    backbone: Backbone
    tokenizer: Tokenizer
    dtype: torch.dtype
    store: TenantStore
    lane: Executor
    replay: Callable[[Sequence[SequenceInput]], Awaitable[list[Tensor]]]

    async def verify(self, tenant: ResidentTenant) -> None:
        """Raises SelfTestFailed, ComputeFailed, or what reading raises."""
        tests = tenant.self_tests
        if not tests:
            tests = await asyncio.get_running_loop().run_in_executor(self.lane, self._find_or_make, tenant.digest)
        outputs = await self.replay([_sequence(test, tenant) for test in tests])
        check_outputs(tests, outputs, self.dtype)

    def _find_or_make(self, digest: str) -> tuple[SelfTest, ...]:
        """On a loader thread: the tests kept beside the blob, or new ones of the dense reference, then kept."""
        if (data := self.store.self_tests(digest)) is not None:
            return load_self_tests(data)
        module = read_tenant_bytes(self.store.blob_path(digest).read_bytes())
        tests = make_self_tests(self.backbone, module, self.tokenizer)
        try:
            self.store.set_self_tests(digest, dump_self_tests(tests))
        except VbertError as error:  # a full disk takes no tests, and is no reason not to serve what is on it
            _log.warning("the self-tests of %s could not be kept: %s", digest[:12], error.message)
        return tests


def _sequence(test: SelfTest, tenant: ResidentTenant) -> SequenceInput:
    return SequenceInput(test.token_ids.tolist(), test.type_ids.tolist(), tenant)
