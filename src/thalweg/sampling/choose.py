"""Tokens under top-k, top-p and min-p: sort, cut, and one draw per row by inverting what is left.

The number that is drawn depends on its request's seed and its position alone, so that batching, chunking and preemption
cannot change what a seeded request draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.ops.sample.reference import splitmix64


def uniform(seeds_R: Tensor, positions_R: Tensor) -> Tensor:
    """float32 [R] in [0, 1) from int64 seeds and positions."""
    bits = splitmix64(splitmix64(seeds_R) + positions_R)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def draw(probs_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """Index [R] at which the running sum of probs (not necessarily normalised) passes u times its total."""
    sums_RV = probs_RV.cumsum(-1, dtype=torch.float64)
    targets_R1 = (uniforms_R.double() * sums_RV[:, -1])[:, None]
    # right=True steps over zero-probability entries at the start; the last positive one bounds the end.
    index_R = torch.searchsorted(sums_RV, targets_R1, right=True).squeeze(-1)
    last_R = (probs_RV > 0).int().cumsum(-1).argmax(-1)
    return torch.minimum(index_R, last_R)


def _tempered(logits_RV: Tensor, temperatures_R: Tensor) -> Tensor:
    # The maximum goes first, so that a tiny temperature divides zeros and negatives and never makes inf - inf.
    return (logits_RV - logits_RV.amax(-1, keepdim=True)) / temperatures_R[:, None]


def sample_filtered(
    logits_RV: Tensor,
    temperatures_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    uniforms_R: Tensor,
) -> Tensor:
    """Ids int64 [R] after top-k (0: off), then top-p over what is left, then min-p relative to the likeliest.

    top_k int64, the others float32, all [R]. The likeliest token always stays.
    """
    sorted_RV, order_RV = _tempered(logits_RV, temperatures_R).sort(dim=-1, descending=True, stable=True)
    V = logits_RV.shape[-1]
    rank_V = torch.arange(V, device=logits_RV.device)
    keep_RV = (rank_V < top_k_R[:, None]) | (top_k_R[:, None] <= 0)
    probs_RV = torch.softmax(sorted_RV.masked_fill(~keep_RV, -torch.inf), -1)
    before_RV = probs_RV.cumsum(-1) - probs_RV
    # top_p 1 is off: rounding in the running sum must not cut the tail.
    keep_RV &= (before_RV < top_p_R[:, None]) | (top_p_R[:, None] >= 1)
    keep_RV &= probs_RV >= min_p_R[:, None] * probs_RV[:, :1]
    keep_RV[:, 0] = True
    picked_R = draw(probs_RV * keep_RV, uniforms_R)
    return order_RV.gather(-1, picked_R[:, None]).squeeze(-1)
