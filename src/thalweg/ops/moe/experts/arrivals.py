"""What blocks of the experts' launches in CUDA C++ tell one another: "down", which ends with the weighted sum
(arrivals.cuh), and gate and up with the router inside (routing.cuh)."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.ops.toolchain.counters import counters

STRIP = 16  # columns that one block adds up at a time
MAX_BLOCKS = 1024  # of a launch


def arrivals(device: torch.device, size: int) -> Tensor:
    """For `size` outputs, how many parts of each strip have come."""
    return counters("experts", device, size // STRIP)


def told_logits(scheme: str, columns: int, device: torch.device, experts: int) -> Tensor:
    """For each expert a logit and the launch that told it, and for each block the number of its last launch. Launches
    that share it, of one scheme and width, have equally many blocks."""
    return counters(f"routed_experts {scheme} {columns}", device, 2 * (experts + MAX_BLOCKS))
