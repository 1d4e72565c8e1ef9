"""Registers tenant files as they come: those that arrive while one commit runs share the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from copy import copy
from functools import partial
from itertools import repeat

from runtime.errors import Draining, StoreFull, VersionConflict
from runtime.store import TenantStore
from runtime.versions import TenantVersion, Upload
from vbert.errors import VbertError

__all__ = ["Registrar"]

_Stored = tuple[TenantVersion, bool]
_MOST_FILES, _MOST_BYTES = 64, 64 * 2**20  # of one commit: others write to the catalogue in between


class Registrar:
    """State is touched by the event loop only; commits run on the store's lane, one at a time, in order of arrival.

    A commit costs three flushes of the disk, whether it holds one tenant or fifty.
    """

    def __init__(self, store: TenantStore, lane: Executor) -> None:
        self._store, self._lane = store, lane
        self._waiting: list[tuple[Upload, asyncio.Future[_Stored]]] = []
        self._busy = False

    async def put(self, upload: Upload) -> _Stored:
        """`TenantStore.put`. What has begun is finished also when the caller leaves."""
        stored: asyncio.Future[_Stored] = asyncio.get_running_loop().create_future()
        self._waiting.append((upload, stored))
        if not self._busy:
            self._commit_next()
        return await stored

    def _commit_next(self) -> None:
        group, num_bytes = 0, 0
        while group < min(len(self._waiting), _MOST_FILES) and num_bytes < _MOST_BYTES:
            num_bytes += len(self._waiting[group][0].data)
            group += 1
        together, self._waiting = self._waiting[:group], self._waiting[group:]
        self._busy = bool(together)
        if together:
            uploads, answers = zip(*together, strict=True)
            try:
                commit = asyncio.get_running_loop().run_in_executor(self._lane, self._commit, uploads)
            except RuntimeError:  # the lane takes nothing more
                _answer(answers, repeat(Draining("the server is stopping and changes no tenants; ask another one")))
                self._commit_next()
            else:
                commit.add_done_callback(partial(self._committed, answers))

    def _committed(
        self, answers: Sequence[asyncio.Future[_Stored]], commit: asyncio.Future[list[_Stored | VbertError]]
    ) -> None:
        error = commit.exception()
        _answer(answers, commit.result() if error is None else repeat(error))
        self._commit_next()

    def _commit(self, uploads: Sequence[Upload]) -> list[_Stored | VbertError]:
        """On the store's thread. Where one of several is refused, each is tried alone."""
        try:
            return list(self._store.put_many(uploads))
        except VbertError as error:
            if len(uploads) == 1 or not isinstance(error, VersionConflict | StoreFull):
                return [error] * len(uploads)
        return [outcome for upload in uploads for outcome in self._commit([upload])]


def _answer(answers: Sequence[asyncio.Future[_Stored]], outcomes: Iterable[_Stored | BaseException]) -> None:
    for answer, outcome in zip(answers, outcomes, strict=False):
        if answer.done():  # its caller left
            continue
        if isinstance(outcome, BaseException):
            answer.set_exception(copy(outcome))  # each gets its own: one raised twice collects both tracebacks
        else:
            answer.set_result(outcome)
