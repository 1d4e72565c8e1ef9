"""First use of a module: its self-tests are found or made, computed beside the requests it was loaded for, compared.

No answer of a module leaves before its self-tests held in the same batch; what was brought in without a request
waiting runs them in a batch of its own.
"""

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
from vbert.errors import SelfTestFailed, VbertError
from vbert.formats.transformers_folder import Backbone
from vbert.model import SequenceInput
from vbert.selftest import check_outputs, dump_self_tests, load_self_tests, make_self_tests
from vbert.tenant import SelfTest
from vbert.tokenizer import Tokenizer

__all__ = ["SelfTester", "as_sequences"]

_TESTED_BY = {"plain": "plain", "exact": "compute", "backoff": "shortened"}  # a test does not depend on what is stored
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTester:
    """replay: a batch of its own on the compute lane."""

    backbone: Backbone
    tokenizer: Tokenizer
    dtype: torch.dtype
    store: TenantStore
    lane: Executor
    replay: Callable[[Sequence[SequenceInput]], Awaitable[list[Tensor]]]

    async def tests(self, tenant: ResidentTenant) -> tuple[SelfTest, ...]:
        """Those of its file, of the store, or new ones. Raises what reading raises."""
        if tenant.self_tests:
            return tenant.self_tests
        return await asyncio.get_running_loop().run_in_executor(self.lane, self._find_or_make, tenant.digest)

    async def verify(self, tenant: ResidentTenant, tests: Sequence[SelfTest]) -> None:
        """In a batch without requests. Raises SelfTestFailed, ComputeFailed."""
        check_outputs(tests, await self.replay(as_sequences(tests, tenant)), self.dtype)

    def verdict(self, tests: Sequence[SelfTest], outcomes: Sequence[Tensor | VbertError]) -> VbertError | None:
        """What is wrong with a module whose self-tests gave these outcomes."""
        if errors := [outcome for outcome in outcomes if isinstance(outcome, VbertError)]:
            return errors[0]
        try:
            check_outputs(tests, [outcome for outcome in outcomes if isinstance(outcome, Tensor)], self.dtype)
        except SelfTestFailed as error:
            return error
        return None

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


def as_sequences(tests: Sequence[SelfTest], tenant: ResidentTenant | None) -> list[SequenceInput]:
    return [
        SequenceInput(
            test.token_ids.tolist(),
            test.type_ids.tolist(),
            tenant,
            paths=(_TESTED_BY[test.path],),
            exit_above=-1.0 if test.exit else 1.0,  # at once, or not at all
            exit_from=test.exit,
        )
        for test in tests
    ]
