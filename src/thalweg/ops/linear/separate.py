"""Fused matrices as the checkpoint has them: one product per matrix, each into its columns of one output. The norm is
the same for all of them, and computed once. And the product and its sum over ranks, each by what serves it alone.

What fusion is tested and timed against.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thalweg.ops.all_reduce import AllReduceAdd, Ranks
from thalweg.ops.norm import NextNorm, RmsNorm


def norm_linear(
    x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_OD: Tensor, *, norm: RmsNorm, parts: tuple[int, ...]
) -> Tensor:
    normed_TD = norm(x_TD, norm_weight_D, eps)
    y_TO = x_TD.new_empty(len(x_TD), len(w_OD))
    for w_PD, y_TP in zip(w_OD.split(parts), y_TO.split(parts, dim=-1), strict=True):
        torch.mm(normed_TD, w_PD.T, out=y_TP)
    return y_TO


def linear_reduce_add(
    x_TD: Tensor,
    w_OD: Tensor,
    residual_TO: Tensor,
    ranks: Ranks,
    *,
    linear: Callable[..., Tensor],
    add: AllReduceAdd,
    next_norm: NextNorm | None = None,
) -> Tensor:
    return add(residual_TO, linear(x_TD, w_OD), ranks, next_norm=next_norm)


def batched_projection(x_T2R: Tensor, w_2OR: Tensor) -> Tensor:
    y_T2O = x_T2R.new_empty(len(x_T2R), *w_2OR.shape[:2])
    for i in range(2):
        torch.mm(x_T2R[:, i], w_2OR[i].T, out=y_T2O[:, i])
    return y_T2O
