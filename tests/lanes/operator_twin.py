"""A GPU's streams for a whole forward, without a GPU: kernels wait in the queues of the fake device, and every access
of memory, by a kernel or by torch, is checked for races.

Kernels are emulated. Operators of torch are done at once, after what their own stream was given before; what other
streams were given comes as early or late as events allow. What was ever used is kept, so that an address means one
tensor.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels import emulator
from tests.lanes.fake_device import FakeDevice
from vbert.kernels import backend, cuda

__all__ = ["Twin"]


@dataclass(frozen=True)
class Range:
    """Rows of float32 numbers in memory."""

    first: int
    count: int

    def data_ptr(self):
        return self.first

    def numel(self):
        return self.count

    def element_size(self):
        return 4


class Twin(TorchDispatchMode):
    """Inside the block, CPU tensors are used as those of a GPU are. drop: as `FakeDevice` has it."""

    def __init__(self, monkeypatch, seed=0, drop=None):
        super().__init__()
        self.device = FakeDevice(seed, drop=drop)
        self.current, self.streams_used, self._kept = self.device.compute, set(), []
        monkeypatch.setattr(cuda, "launcher", self._launch)
        monkeypatch.setitem(backend.OF_DEVICE, "cpu", backend.Backend.CUDA)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.current)
        monkeypatch.setattr(torch.cuda, "Stream", lambda _, priority: self.device.stream(f"side {priority}"))
        monkeypatch.setattr(torch.cuda, "stream", self._issuing_to)

    def __exit__(self, *what):
        super().__exit__(*what)
        self.device.close()

    @contextmanager
    def _issuing_to(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def _launch(self, file, kernel, scalar, arguments, grid, shared_bytes, device):
        assert scalar == cuda.CODES[torch.float32]
        self.streams_used.add(self.current.name)
        reads, writes = _touched(arguments[0], grid[0])
        run = partial(emulator.launch, file, kernel, scalar, arguments.copy(), grid, shared_bytes, device)
        self.current.issue(run, reads=reads, writes=writes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        while self.current.queue and self.device.step():
            pass
        assert not self.current.queue, "streams wait for each other"
        out = func(*args, **kwargs)
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
        named = {argument.name: argument for argument in func._schema.arguments}
        pairs = [*zip(func._schema.arguments, args, strict=False), *((named[name], kwargs[name]) for name in kwargs)]
        written = [value for argument, value in pairs if argument.alias_info and argument.alias_info.is_write]
        made = [tensor for tensor in tree_leaves((out, written)) if isinstance(tensor, torch.Tensor)]
        self._kept += given + made
        self.current.issue(lambda: None, reads=given, writes=made)
        return out


def _touched(arguments, num_blocks):
    """Rows that a kernel of a segmented operator reads of `x` and writes of each `out`, block by block."""
    names = arguments.dtype.names
    width = "width" if "width" in names else "width_in"
    read = [(arguments["x"], arguments["x_stride"], arguments[width])]
    if "sites" in names:
        written = [(site["out"], site["out_stride"], site["width_out"]) for site in arguments["sites"] if site["out"]]
    else:
        width = "width" if "width" in names else "width_out"
        written = [(arguments["out"], arguments["out_stride"], arguments[width])]
    numbers = (ctypes.c_int32 * (3 * num_blocks)).from_address(int(arguments["blocks"]))
    blocks = np.array(numbers).reshape(-1, 3).tolist()
    return ([_rows(*where, block) for where in part for block in blocks] for part in (read, written))


def _rows(address, stride, width, block):
    _, first, count = block
    return Range(int(address) + 4 * first * int(stride), (count - 1) * int(stride) + int(width))
