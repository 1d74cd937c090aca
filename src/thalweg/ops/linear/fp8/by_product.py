"""The three linears over float8 by one product, for those whose product can take the norm but not the rest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thalweg.ops.norm.triton.rms import rms_norm

Linear = Callable[..., Tensor]


def linears_by(product: Callable[..., Tensor]) -> tuple[Linear, Linear, Linear]:
    """("linear_fp8", "norm_linear_fp8", "linear_add_fp8"). The rest goes by the library, behind a norm in a launch of
    its own.

    `product(x_TD, q_OD, scale_OB, residual_TO=None, out_TO=None, norm=None)` gives [T, O] = x w^T, of x or its RMSNorm
    with `norm`, (weight_D, eps), plus the residual; in out_TO, which has a unit last stride, if it is given.
    """

    def linear_fp8(x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, rest_RD: Tensor | None = None) -> Tensor:
        if rest_RD is None:
            return product(x_TD, q_OD, scale_OB)
        O = len(q_OD)
        y_TX = x_TD.new_empty(len(x_TD), O + len(rest_RD))
        product(x_TD, q_OD, scale_OB, out_TO=y_TX[:, :O])
        torch.mm(x_TD, rest_RD.T, out=y_TX[:, O:])
        return y_TX

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
        if rest_RD is None:
            return product(x_TD, q_OD, scale_OB, norm=(norm_weight_D, eps))
        return linear_fp8(rms_norm(x_TD, norm_weight_D, eps), q_OD, scale_OB, rest_RD)

    def linear_add_fp8(x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, residual_TO: Tensor) -> Tensor:
        return product(x_TD, q_OD, scale_OB, residual_TO)

    return linear_fp8, norm_linear_fp8, linear_add_fp8
