"""Linear projections of many tokens over float8 at the rate of Hopper's matrix unit (ops/products says how it works): x
goes to float8 too, in a launch of its own that has the norm."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.ops.norm.triton.rms import rms_norm
from thalweg.ops.products.cuda import dense
from thalweg.ops.products.triton import quantize_rows


def linear_fp8(x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, rest_RD: Tensor | None = None) -> Tensor:
    """The rest goes by the library."""
    if rest_RD is None:
        return _product(x_TD, q_OD, scale_OB)
    O = len(q_OD)
    y_TX = x_TD.new_empty(len(x_TD), O + len(rest_RD))
    _product(x_TD, q_OD, scale_OB, out_TO=y_TX[:, :O])
    torch.mm(x_TD, rest_RD.T, out=y_TX[:, O:])
    return y_TX


def norm_linear_fp8(
    x_TD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    q_OD: Tensor,
    scale_OB: Tensor,
    rest_RD: Tensor | None = None,
) -> Tensor:
    """With a rest, behind a norm in a launch of its own."""
    if rest_RD is None:
        return _product(x_TD, q_OD, scale_OB, norm=(norm_weight_D, eps))
    return linear_fp8(rms_norm(x_TD, norm_weight_D, eps), q_OD, scale_OB, rest_RD)


def linear_add_fp8(x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, residual_TO: Tensor) -> Tensor:
    return _product(x_TD, q_OD, scale_OB, residual_TO)


def _product(
    x_TD: Tensor,
    q_OD: Tensor,
    scale_OB: Tensor,
    residual_TO: Tensor | None = None,
    out_TO: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """[T, O] = x w^T, of x or its RMSNorm, plus the residual; in out_TO if it is given."""
    y_TO = x_TD.new_empty(len(x_TD), len(q_OD)) if out_TO is None else out_TO
    if len(x_TD):
        rows, x_scales_BT, w_scales_BO = quantize_rows(x_TD, scale_OB, norm)
        dense(rows, q_OD, x_scales_BT, w_scales_BO, y_TO, residual_TO)
    return y_TO
