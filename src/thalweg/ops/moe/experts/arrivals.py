"""Counters of "down" in CUDA C++, which ends with the weighted sum (arrivals.cuh)."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.ops.toolchain.counters import counters

STRIP = 16  # columns that one block adds up at a time


def arrivals(device: torch.device, size: int) -> Tensor:
    """For `size` outputs, how many parts of each strip have come."""
    return counters("experts", device, size // STRIP)
