"""Memory in pages of 2 MiB where the system has them: reading it waits less for addresses to be looked up."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

ARENA = 64 << 20
"""Bytes taken at once, or as many as one tensor needs."""


class Arena:
    """Tensors side by side, for good: on its own each would fill its pages in part."""

    def __init__(self) -> None:
        self._room = memoryview(b"")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._room):
            self._room = memoryview(_map(max(size, ARENA)))
        taken, self._room = self._room[:size], self._room[-(-size // 64) * 64 :]
        return torch.frombuffer(taken, dtype=dtype).view(shape)


def _map(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # no Linux
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
