"""Counters of "down" in CUDA C++, which ends with the weighted sum (arrivals.cuh)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from thalweg.errors import KernelError

STRIP = 16  # columns that one block adds up at a time


@cache
def arrivals(device: torch.device, size: int) -> Tensor:
    """For `size` outputs, how many parts of each strip have come: zero between launches, which leave them so."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise KernelError("experts ran for the first time while a graph was captured; run them once before")
    return torch.zeros(size // STRIP, dtype=torch.int32, device=device)
