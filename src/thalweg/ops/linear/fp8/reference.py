"""Linear projections over float8 in plain torch: each call widens the whole matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.ops.norm.reference import rms_norm
from thalweg.quant import FP8_LINEARS


def linear_fp8(x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, rest_RD: Tensor | None = None) -> Tensor:
    w_OD = FP8_LINEARS.widened([q_OD, scale_OB], 1, x_TD.dtype)
    return F.linear(x_TD, w_OD if rest_RD is None else torch.cat([w_OD, rest_RD]))


def norm_linear_fp8(
    x_TD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    q_OD: Tensor,
    scale_OB: Tensor,
    rest_RD: Tensor | None = None,
    *,
    in_float8: tuple[Tensor, Tensor] | None = None,  # not used
) -> Tensor:
    return linear_fp8(rms_norm(x_TD, norm_weight_D, eps), q_OD, scale_OB, rest_RD)


def linear_add_fp8(x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, residual_TO: Tensor) -> Tensor:
    return torch.addmm(residual_TO, x_TD, FP8_LINEARS.widened([q_OD, scale_OB], 1, x_TD.dtype).T)
