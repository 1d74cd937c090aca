"""Gumbel-max sampling with counter-based noise in plain torch.

splitmix64 (Steele, Lea and Flood, OOPSLA 2014) on int64 tensors, whose products wrap as the algorithm wants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from thalweg.ops.all_reduce import Ranks

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64
LARGEST_UNIFORM = 1 - 2.0**-24


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 >> keeps the sign; the unsigned shift does not


def splitmix64(x: Tensor) -> Tensor:
    """One output of the generator for every state in x (int64, any shape)."""
    x = x + GOLDEN
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)


def gumbel(seeds_R: Tensor, positions_R: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise, fp32 [R, vocab], finite everywhere."""
    row_R = splitmix64(splitmix64(seeds_R) + positions_R)
    bits_RV = _shift_right(splitmix64(row_R[:, None] + torch.arange(vocab, device=seeds_R.device)), 32)
    # Winners have a small exponential, so the uniform is taken near 0, where fp32 is fine, and through log1p.
    uniform_RV = ((bits_RV.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=LARGEST_UNIFORM)
    return -(-torch.log1p(-uniform_RV)).log()


def sample(
    logits_RV: Tensor,
    temperatures_R: Tensor,
    seeds_R: Tensor,
    positions_R: Tensor,
    slots_R: Tensor | None = None,
    *,
    check: bool = False,
) -> Tensor:
    if slots_R is not None:
        temperatures_R, seeds_R = temperatures_R[slots_R], seeds_R[slots_R]
    logits_RV = logits_RV.float()
    finite_R = logits_RV.isfinite().all(-1) if check else None
    logits_RV = logits_RV.masked_fill(logits_RV.isnan(), -torch.inf)
    hot_R1 = temperatures_R.float()[:, None]
    drawn_RV = logits_RV / hot_R1.where(hot_R1 > 0, 1.0) + gumbel(seeds_R, positions_R, logits_RV.shape[1])
    ids_R = torch.where(hot_R1 > 0, drawn_RV, logits_RV).argmax(-1)
    return ids_R if finite_R is None else ids_R.where(finite_R, -1)


def sample_over_ranks(
    logits_RV: Tensor,
    temperatures_N: Tensor,
    seeds_N: Tensor,
    positions_R: Tensor,
    slots_R: Tensor,
    ranks: Ranks,
    *,
    vocab: int,
) -> Tensor:
    logits_RV = ranks.all_gather_last(logits_RV)[:, :vocab]
    return sample(logits_RV, temperatures_N, seeds_N, positions_R, slots_R, check=True)
