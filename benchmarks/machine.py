"""What a number was measured on: machine, versions, commit, and how busy the neighbours were meanwhile."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from runtime.machine import cpu_model

__all__ = ["Neighbours", "commit", "describe", "has_native_bfloat16"]

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "numpy", "numba", "transformers", "tokenizers", "peft", "adapters", "aiohttp", "uvloop")
_NOISY_CORES = 0.1  # more than this much of one core used by others, and a number is marked


def describe() -> dict[str, Any]:
    """CPU, cores, memory, software and thread settings, as JSON values. Names no host and no user."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "native_bfloat16": has_native_bfloat16(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "omp": {name: os.environ[name] for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if name in os.environ},
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def commit() -> str:
    """The commit of this checkout, with -dirty when a tracked file differs that is no result; `unknown` outside one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        differs = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"], cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + ("-dirty" if differs.returncode else "")


def has_native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself: AMX or AVX512-BF16."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


class Neighbours:
    """How much of the machine other processes used since this object was made."""

    def __init__(self) -> None:
        self._begin = self._read()

    def report(self) -> dict[str, Any]:
        """load_average; other_cores: cores' worth of CPU time that was not ours; noisy: too much for a quiet number."""
        (total, busy, ours), (total0, busy0, ours0) = self._read(), self._begin
        elapsed_s = (total - total0) / (os.cpu_count() or 1)
        other = max(0.0, (busy - busy0) - (ours - ours0)) / elapsed_s if elapsed_s > 0.2 else 0.0
        load = round(os.getloadavg()[0], 2)
        return {"load_average": load, "other_cores": round(other, 3), "noisy": other > _NOISY_CORES}

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """(all, busy, ours) in seconds of CPU time; ours includes children that have ended."""
        tick = os.sysconf("SC_CLK_TCK")
        fields = [int(n) / tick for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        idle = fields[3] + fields[4]
        return sum(fields), sum(fields) - idle, sum(os.times()[:4])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
