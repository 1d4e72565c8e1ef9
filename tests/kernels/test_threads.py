"""The kernels leave torch's thread count alone: numba's first launch in a process would set it to all cores."""

import subprocess
import sys

import pytest

_SCRIPT = """
import torch
from vbert.kernels.rows import use_threads
torch.set_num_threads(1)
assert torch.get_num_threads() == 1
use_threads(10**9)
print(torch.get_num_threads())
"""


@pytest.mark.slow
def test_the_first_kernel_leaves_torch_its_threads(monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
