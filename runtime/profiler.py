"""Measures the cost model of this machine: forwards, module loads, uploads, row gathers, self-test replays.

Blocking; on the thread that will compute, since OpenMP has a pool a thread. What is timed is what serving runs: the
packed forward, the arena's own read of a native file, in the compute dtype.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from runtime.clock import Clock
from runtime.cost import TYPICAL_LENGTH, Conditions, CostModel, Curve
from runtime.machine import cpu_model, wait_policy
from runtime.probes import Probes
from runtime.sampler import Repeats, Sampler, Trial
from runtime.uploads import all_moved_at_once
from vbert.arena import ResidentTenant
from vbert.encoder import Encoder
from vbert.formats.transformers_folder import Backbone
from vbert.local_layers import LocalLayers
from vbert.model import Model, SequenceInput
from vbert.ngram.index import Keys, ngram_keys
from vbert.skip import own_paths

__all__ = ["FULL", "QUICK", "Effort", "Profiler", "conditions_here"]

_TABLE_ROWS = 1 << 16
_UPLOAD_BYTES = (1 << 14, 1 << 18, 1 << 22, 1 << 26)
_SELF_TESTS, _SELF_TEST_TOKENS, _SELF_TEST_RANK = 3, 12, 8  # of one module


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What is measured, and how long.

    tokens, lengths: of forwards. ranks: of the modules that are loaded. rows: gathered at once. ngrams: computed at
    once. modules: whose self-tests are replayed at once. kinds, tenants: of modules that take part in a forward.
    weights: whether those of a whole model are loaded, too.
    """

    tokens: tuple[int, ...]
    lengths: tuple[int, ...]
    ranks: tuple[int, ...]
    rows: tuple[int, ...]
    ngrams: tuple[int, ...]
    modules: tuple[int, ...]
    kinds: tuple[tuple[str, int], ...]
    tenants: tuple[int, ...]
    weights: bool
    repeats: Repeats


FULL = Effort(
    tokens=(8, 32, 128, 512, 1024, 2048, 4096, 8192),
    lengths=(8, 32, 128, 512),
    ranks=(1, 4, 16, 64, 256),
    rows=(16, 64, 256, 1024, 4096, 16384),
    ngrams=(1, 4, 16, 64, 256, 1024, 4096),
    modules=(1, 2, 4, 8, 16),
    kinds=(("low_rank", 8), ("low_rank", 64), ("bottleneck", 64), ("affine", 0), ("sparse", 10)),
    tenants=(1, 16),
    weights=True,
    repeats=Repeats(least=1, most=8, point_s=0.12, largest_s=1.0, passes=5),
)
QUICK = Effort(
    tokens=(32, 128, 512),
    lengths=(32, 128),
    ranks=(1, 16, 64),
    rows=(16, 4096),
    ngrams=(4, 64, 512),
    modules=(1, 4),
    kinds=(),
    tenants=(),
    weights=False,
    repeats=Repeats(least=2, most=9, point_s=0.05, largest_s=0.2),
)


def conditions_here(backbone: Backbone, dtype: torch.dtype, device: torch.device, threads: int) -> Conditions:
    """What a profile that is measured now holds for. threads: the most the compute lane uses."""
    config, skip = backbone.config, backbone.skip
    on_gpu = device.type == "cuda"
    return Conditions(
        device=torch.cuda.get_device_name(device) if on_gpu else cpu_model(),
        threads=threads,
        wait_policy=wait_policy(),
        dtype=str(dtype).removeprefix("torch."),
        torch=torch.__version__,
        vbert=_version(),
        layers=config.num_layers,
        hidden=config.hidden_size,
        ffn=config.ffn_size,
        local_layers=0 if skip is None else skip.config.local_layers,
    )


@dataclass(kw_only=True, eq=False)
class Profiler:
    """folder: on the disk that modules are loaded from; files are written there and deleted. thread_counts: those the
    compute lane chooses from. progress: told what is measured, the curves done and their number."""

    backbone: Backbone
    model: Model
    folder: Path
    thread_counts: Sequence[int]
    effort: Effort
    clock: Clock
    progress: Callable[[str, int, int], None] = field(default=lambda what, done, total: None)

    def run(self) -> CostModel:
        """Raises OSError when the folder cannot be written."""
        threads = torch.get_num_threads()
        try:
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch, torch.inference_mode():
                curves = self._measure(Path(scratch))
        finally:
            torch.set_num_threads(threads)
        conditions = conditions_here(self.backbone, self.model.dtype, self.model.device, max(self.thread_counts))
        return CostModel(conditions, curves)

    def _measure(self, scratch: Path) -> dict[str, Curve]:
        lengths = [length for length in self.effort.lengths if length <= self.backbone.config.max_length]
        todo: dict[str, Callable[[], Trial]] = {
            f"forward/{n}": partial(self._forwards, n) for n in lengths or [self.backbone.config.max_length]
        }
        for kind, size in self.effort.kinds:
            todo |= {
                f"with/{kind}/{size}/{n}": partial(self._with, scratch, kind, size, n) for n in self.effort.tenants
            }
        todo |= {f"load/{tier}": partial(self._loads, scratch, tier) for tier in ("warm", "cold")}
        if self.effort.weights:
            todo |= {"swap": partial(self._swaps, scratch)}
        todo |= {f"gather_rows/{self.backbone.config.hidden_size}": self._gathers}
        todo |= {"self_test": partial(self._self_tests, scratch)}
        if self.model.local is not None:
            todo |= {"local": partial(self._local, self.model.local)}
        if self.model.device.type == "cuda":
            todo |= {"upload": self._uploads}
        self._forward(self._sequences(1, lengths[0] if lengths else 1))  # what happens once, happens here
        trials = {name: prepared() for name, prepared in todo.items()}
        sampler = Sampler(self.effort.repeats, self.clock)
        curves = sampler.curves(trials, lambda name, done, total: self.progress(f"profile: {name}", done, total))
        self.progress("profile", 1, 1)
        return curves

    # ---- one curve each --------------------------------------------------------------------------------------------

    def _forwards(self, length: int) -> Trial:
        counts = sorted({max(1, tokens // length) for tokens in self.effort.tokens})
        runs = {n * length: partial(self._forward, self._sequences(n, length)) for n in counts}
        return Trial(runs=runs, thread_counts=self.thread_counts)

    def _with(self, scratch: Path, kind: str, size: int, num_tenants: int) -> Trial:
        """Sequences of so many tenants in turn, at least one of each."""
        probes = Probes(self.backbone, self.model.dtype, scratch)
        paths = [probes.write(size, name=str(i), kind=kind) for i in range(num_tenants)]
        tenants = all_moved_at_once([probes.load(path) for path in paths], self.model)
        length = min(TYPICAL_LENGTH, self.backbone.config.max_length)
        counts = sorted({max(num_tenants, tokens // length) for tokens in self.effort.tokens})
        runs = {}
        for count in counts:
            shares = [len(range(i, count, num_tenants)) for i in range(num_tenants)]
            every = [s for t, n in zip(tenants, shares, strict=True) for s in self._sequences(n, length, t)]
            runs[count * length] = partial(self._forward, every)
        return Trial(runs=runs, thread_counts=self.thread_counts)

    def _loads(self, scratch: Path, tier: str) -> Trial:
        """Sizes are what the modules take in memory."""
        probes = Probes(self.backbone, self.model.dtype, scratch)
        paths = [probes.write(rank) for rank in self.effort.ranks]
        if self.effort.weights:
            paths.append(probes.write(0, kind="weights"))
        runs = {probes.num_bytes(path): partial(probes.load_and_release, path) for path in paths}
        forget = {probes.num_bytes(path): partial(probes.forget, path) for path in paths}
        return Trial(runs=runs, before=forget if tier == "cold" else {})

    def _swaps(self, scratch: Path) -> Trial:
        """What a batch of another tenant with weights of its own needs before it: views of its slot. The weights are
        where they compute."""
        probes = Probes(self.backbone, self.model.dtype, scratch)
        (tenant,) = all_moved_at_once([probes.load(probes.write(0, kind="weights"))], self.model)
        return Trial(runs={tenant.num_bytes: partial(Encoder.of_tenant, self.backbone.config, tenant)})

    def _gathers(self) -> Trial:
        width = self.backbone.config.hidden_size
        table = torch.zeros(_TABLE_ROWS, width, dtype=self.model.dtype)
        table += 1  # else every row is the same page of zeros
        spread = [torch.arange(rows) * 48_271 % _TABLE_ROWS for rows in self.effort.rows]
        return Trial(runs={len(rows): partial(torch.index_select, table, 0, rows) for rows in spread})

    def _local(self, local: LocalLayers) -> Trial:
        """Distinct n-grams, none of which is stored."""

        def encode(keys: Keys) -> None:
            local.encode(keys)
            self._wait()

        size = self.backbone.config.vocab_size
        every = ngram_keys(np.arange(max(self.effort.ngrams)) * 7919 % size, np.array([0, max(self.effort.ngrams)]))
        runs = {n: partial(encode, every[:n]) for n in self.effort.ngrams}
        return Trial(runs=runs, thread_counts=self.thread_counts)

    def _self_tests(self, scratch: Path) -> Trial:
        """Three short texts a module, every module another one."""
        probes = Probes(self.backbone, self.model.dtype, scratch)
        paths = [probes.write(_SELF_TEST_RANK, name=str(i)) for i in range(max(self.effort.modules))]
        tenants = all_moved_at_once([probes.load(path) for path in paths], self.model)
        runs = {}
        for modules in self.effort.modules:
            sequences = [s for t in tenants[:modules] for s in self._sequences(_SELF_TESTS, _SELF_TEST_TOKENS, t)]
            runs[modules] = partial(self._forward, sequences)
        return Trial(runs=runs, thread_counts=self.thread_counts)

    def _uploads(self) -> Trial:
        """Pinned host memory to the device."""
        host = torch.zeros(max(_UPLOAD_BYTES), dtype=torch.uint8).pin_memory()
        device = torch.empty_like(host, device=self.model.device)

        def upload(num_bytes: int) -> None:
            device[:num_bytes].copy_(host[:num_bytes], non_blocking=True)
            self._wait()

        return Trial(runs={num_bytes: partial(upload, num_bytes) for num_bytes in _UPLOAD_BYTES})

    def _forward(self, sequences: Sequence[SequenceInput]) -> None:
        self.model.forward(self.model.pack(sequences))
        self._wait()

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def _sequences(self, count: int, length: int, tenant: ResidentTenant | None = None) -> list[SequenceInput]:
        size, paths = self.backbone.config.vocab_size, own_paths(self.backbone.skip)
        every = [[(7919 * n + i) % size for i in range(1, length + 1)] for n in range(count)]
        return [SequenceInput(ids, [0] * length, tenant, paths=paths) for ids in every]


def _version() -> str:
    try:
        return version("vbert")
    except PackageNotFoundError:
        return "0"  # a bare checkout
