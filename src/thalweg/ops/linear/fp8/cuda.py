"""Linear projections of a few tokens over float8 in CUDA C++: a launch, and one more if there is a rest in bf16."""

from __future__ import annotations

from torch import Tensor

from thalweg.ops.linear.cuda import stream


def linear_fp8(x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, rest_RD: Tensor | None = None) -> Tensor:
    return _both(x_TD, q_OD, scale_OB, rest_RD, None)


def norm_linear_fp8(
    x_TD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    q_OD: Tensor,
    scale_OB: Tensor,
    rest_RD: Tensor | None = None,
) -> Tensor:
    return _both(x_TD, q_OD, scale_OB, rest_RD, (norm_weight_D, eps))


def linear_add_fp8(x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, residual_TO: Tensor) -> Tensor:
    return stream(x_TD, q_OD, scale_OB, residual_TO=residual_TO)


def _both(
    x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, rest_RD: Tensor | None, norm: tuple[Tensor, float] | None
) -> Tensor:
    if rest_RD is None:
        return stream(x_TD, q_OD, scale_OB, norm)
    O = len(q_OD)
    y_TX = x_TD.new_empty(len(x_TD), O + len(rest_RD))
    stream(x_TD, q_OD, scale_OB, norm, out_TO=y_TX[:, :O])
    stream(x_TD, rest_RD, None, norm, out_TO=y_TX[:, O:])
    return y_TX
