"""Counters by which the last program of a launch to finish a part learns that it is the last."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from thalweg.errors import UnsupportedError

SIZE = 1 << 16


@cache
def arrivals(device: torch.device) -> Tensor:
    """int32 zeros [SIZE] on `device`, which every kernel leaves zero again: safe in replayed graphs.

    One buffer a device: kernels that use it must not run at the same time on two streams. Called for the first time
    while a graph is captured it would be cleared only when that graph is replayed, hence the error.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError("a CUDA graph captures kernels that never ran on this device; expected one run before")
    return torch.zeros(SIZE, dtype=torch.int32, device=device)
