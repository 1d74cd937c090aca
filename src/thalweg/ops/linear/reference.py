"""Linear projections in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.ops.all_reduce import Ranks
from thalweg.ops.norm import NextNorm
from thalweg.ops.norm.reference import rms_norm
from thalweg.quant import GgmlRows


def linear(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    return F.linear(x_TD, w_OD)


def norm_linear(x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_OD: Tensor) -> Tensor:
    return F.linear(rms_norm(x_TD, norm_weight_D, eps), w_OD)


def linear_add(x_TD: Tensor, w_OD: Tensor, residual_TO: Tensor) -> Tensor:
    return torch.addmm(residual_TO, x_TD, w_OD.T)


def linear_add_in_place(x_TD: Tensor, w_OD: Tensor, residual_TO: Tensor) -> Tensor:
    return residual_TO.addmm_(x_TD, w_OD.T)  # no copy of the residual first


def linear_reduce_add(
    x_TD: Tensor,
    w_OD: Tensor,
    residual_TO: Tensor,
    ranks: Ranks,
    *,
    next_norm: NextNorm | None = None,  # not computed
) -> Tensor:
    return residual_TO + ranks.all_reduce(F.linear(x_TD, w_OD))


def linear_ggml(
    scheme: GgmlRows,
    x_TD: Tensor,
    blocks: Tensor,
    *,
    norm_weight_D: Tensor | None = None,
    eps: float = 0.0,
    residual_TO: Tensor | None = None,
) -> Tensor:
    if norm_weight_D is not None:
        x_TD = rms_norm(x_TD, norm_weight_D, eps)
    y_TO = torch.cat([F.linear(x_TD, w_OD) for w_OD in scheme.slices(blocks, x_TD.dtype)], dim=-1)
    return y_TO if residual_TO is None else residual_TO + y_TO
