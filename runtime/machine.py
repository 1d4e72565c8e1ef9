"""What this machine is: its name, its cores, and how its OpenMP threads wait."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

__all__ = ["available_bytes", "cpu_model", "usable_cores", "wait_policy"]

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def cpu_model() -> str:
    """As the system names it."""
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.processor() or "unknown"


def available_bytes() -> int:
    """Memory that may be had without swapping, as the system estimates it, and no more than a container has left; 0
    where nothing is known."""
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        free = [1024 * int(match[1]) if match else 0]
        for limit, used in _LIMITS:
            if (_CGROUP / limit).exists() and (most := (_CGROUP / limit).read_text().strip()).isdigit():
                free.append(int(most) - int((_CGROUP / used).read_text()))
        return max(0, min(free))
    except (OSError, ValueError):
        return 0


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def wait_policy() -> str:
    """`PASSIVE`, `ACTIVE`, or `default` where OMP_WAIT_POLICY is not set.

    Not a setting of ours: the OpenMP library read it when torch was loaded.
    """
    return os.environ.get("OMP_WAIT_POLICY", "").upper() or "default"
