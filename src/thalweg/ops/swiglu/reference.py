"""The first half of a dense feed-forward block in plain torch."""

from __future__ import annotations

from torch import Tensor

from thalweg.ops.activation.reference import silu_and_mul
from thalweg.ops.linear.reference import norm_linear


def norm_swiglu(x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_2ID: Tensor) -> Tensor:
    return silu_and_mul(norm_linear(x_TD, norm_weight_D, eps, w_2ID))
