"""The named threads of one engine. Blocking work goes to one of them, by what it must not hold up."""

from __future__ import annotations

import contextlib
import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from runtime.machine import usable_cores

__all__ = ["Lanes", "use_one_heap"]

_M_ARENA_MAX = -8  # of malloc.h


@dataclass(frozen=True, slots=True)
class Lanes:
    """compute: every forward pass, one at a time. rows: packs batches and gathers rows ahead of it. results: waits for
    the answers of a device that runs ahead. loader: module files. tokenizer: long texts. store: the catalogue. imports:
    checkpoints being read and converted, which may take seconds, and n-gram tables after a start, piece by piece.

    Only the compute lane uses more than one core: OpenMP has one pool a launching thread, and a second pool that spins
    beside the first makes both slower than one core would be (DESIGN.md, section 8).
    """

    compute: ThreadPoolExecutor
    rows: ThreadPoolExecutor
    results: ThreadPoolExecutor
    loader: ThreadPoolExecutor
    tokenizer: ThreadPoolExecutor
    store: ThreadPoolExecutor
    imports: ThreadPoolExecutor

    @classmethod
    def open(cls, compute_threads: int) -> Lanes:
        """compute_threads: cores of the compute lane to begin with, 0 for all that this process may use."""
        cores = compute_threads or usable_cores()
        return cls(
            compute=_lane("compute", 1, cores),
            rows=_lane("rows", 1, 1),
            results=_lane("results", 1, 1),
            loader=_lane("loader", 2, 1),
            tokenizer=_lane("tokenizer", 1, 1),
            store=_lane("store", 1, 1),
            imports=_lane("imports", 1, 1),
        )

    def close(self) -> None:
        """Finish what was begun, then end. Callers see to it that nothing new comes."""
        for lane in (self.imports, self.tokenizer, self.loader, self.rows, self.compute, self.results, self.store):
            lane.shutdown(wait=True)


def use_one_heap() -> None:
    """Let threads that begin from now on share the heap of the main thread. For a process that is a server.

    glibc gives every thread a heap of its own and returns what is free in it at once, so that a compute thread gets its
    memory anew, page fault by page fault, in every forward. Another C library does nothing here.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _lane(name: str, num_threads: int, torch_threads: int) -> ThreadPoolExecutor:
    # torch.set_num_threads holds for the thread that calls it (and for threads started later that do not call it)
    return ThreadPoolExecutor(
        num_threads, f"vbert-{name}", initializer=torch.set_num_threads, initargs=(torch_threads,)
    )
