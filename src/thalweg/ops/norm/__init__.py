"""Ops "rms_norm", "add_rms_norm" and "gated_rms_norm".

All compute in fp32 and round to the input dtype once, after the weight. Weights may be of another dtype.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from thalweg.ops.norm import reference
from thalweg.ops.registry import register


class RmsNorm(Protocol):
    def __call__(self, x_TD: Tensor, weight_D: Tensor, eps: float, /) -> Tensor:
        """y_TD = x / sqrt(mean(x^2) + eps) * weight over the last dimension; x is [..., D]."""


class AddRmsNorm(Protocol):
    def __call__(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, /
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(r), r) with r_TD = x + residual, rounded to the input dtype before it is normalised.

        The rounding point makes the op bit-identical to an addition followed by rms_norm. x and residual
        share one shape and dtype. Neither input is changed.
        """


class GatedRmsNorm(Protocol):
    def __call__(self, o_THV: Tensor, gate_THV: Tensor, weight_V: Tensor, eps: float, /) -> Tensor:
        """y_THV = rms_norm(o) * sigmoid(gate), normalised over the last dimension (each head by itself)."""


_rms_norm: RmsNorm = reference.rms_norm
_add_rms_norm: AddRmsNorm = reference.add_rms_norm
_gated_rms_norm: GatedRmsNorm = reference.gated_rms_norm
register("rms_norm", "reference", _rms_norm)
register("add_rms_norm", "reference", _add_rms_norm)
register("gated_rms_norm", "reference", _gated_rms_norm)
