"""What this machine is: its name, its cores, and how its OpenMP threads wait."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

__all__ = ["available_bytes", "cpu_model", "usable_cores", "wait_policy"]

_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def cpu_model() -> str:
    """As the system names it."""
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.processor() or "unknown"


def available_bytes() -> int:
    """Memory that may be had without swapping, as the system estimates it, and no more than a container's limit."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    free = 1024 * int(match[1]) if match else 0
    limit = _CONTAINER_LIMIT.read_text().strip() if _CONTAINER_LIMIT.exists() else "max"
    return min(free, int(limit)) if limit.isdigit() else free


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def wait_policy() -> str:
    """`PASSIVE`, `ACTIVE`, or `default` where OMP_WAIT_POLICY is not set.

    Not a setting of ours: the OpenMP library read it when torch was loaded.
    """
    return os.environ.get("OMP_WAIT_POLICY", "").upper() or "default"
