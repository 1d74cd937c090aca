"""Counter-based uniforms: the number used for a token depends on its request's seed and its position alone, so that
batching, chunking and preemption cannot change what a seeded request draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.ops.sample.reference import splitmix64


def uniform(seeds_R: Tensor, positions_R: Tensor) -> Tensor:
    """float32 [R] in [0, 1) from int64 seeds and positions."""
    bits = splitmix64(splitmix64(seeds_R) + positions_R)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24
