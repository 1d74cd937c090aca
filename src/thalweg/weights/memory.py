"""Memory for weights on a CPU, in huge pages where the system has them for the asking."""

from __future__ import annotations

import contextlib
import mmap
from math import prod

import torch
from torch import Tensor

CHUNK = 64 << 20  # bytes; a weight that is larger has a chunk of its own
HUGE = 2 << 20  # bytes of a huge page, which chunks begin at a multiple of
LINE = 64  # bytes, which weights begin at a multiple of


class WeightMemory:
    """Gives tensors out of large chunks of memory, which stay until all tensors in them are gone.

    A decode step reads every weight once. In pages of 4 KiB the processor looks up where each page is, which costs up
    to a tenth of the step.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised."""
        size = prod(shape) * dtype.itemsize
        if self._used + size > len(self._chunk):
            chunk = _huge(max(size, CHUNK))
            if chunk is None:
                return torch.empty(shape, dtype=dtype)
            self._chunk, self._used = chunk, 0
        place = self._chunk[self._used : self._used + size]
        self._used += -(-size // LINE) * LINE
        return place.view(dtype).view(shape)


def _huge(size: int) -> Tensor | None:
    """uint8 [size] that takes memory as it is written; None if the system gives none so."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE
    return whole[begin : begin + size]
