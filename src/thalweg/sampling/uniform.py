"""Counter-based uniforms: the number used for a token depends on its request's seed and its position alone, so that
batching, chunking and preemption cannot change what a seeded request draws.

splitmix64 (Steele, Lea and Flood, OOPSLA 2014) on int64 tensors, whose products wrap as the algorithm wants.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 >> keeps the sign; the unsigned shift does not


def splitmix64(x: Tensor) -> Tensor:
    """One output of the generator for every state in x (int64, any shape)."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(seeds_R: Tensor, positions_R: Tensor) -> Tensor:
    """float32 [R] in [0, 1) from int64 seeds and positions."""
    bits = splitmix64(splitmix64(seeds_R) + positions_R)
    return _shift_right(bits, 40).to(torch.float32) * (1.0 / (1 << 24))
