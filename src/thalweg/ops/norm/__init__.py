"""Ops "rms_norm" and "gated_rms_norm".

Both compute in fp32 and round to the input dtype once, after the weight. Weights may be of another dtype.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.norm import reference
from thalweg.ops.registry import OpContext, register
from thalweg.ops.toolchain.triton_support import why_not


class RmsNorm(Protocol):
    def __call__(self, x_TD: Tensor, weight_D: Tensor, eps: float, /) -> Tensor:
        """y_TD = x / sqrt(mean(x^2) + eps) * weight over the last dimension; x is [..., D] with unit last stride."""


class GatedRmsNorm(Protocol):
    def __call__(self, o_THV: Tensor, gate_THV: Tensor, weight_V: Tensor, eps: float, /) -> Tensor:
        """y_THV = rms_norm(o) * sigmoid(gate), normalised over the last dimension (each head by itself)."""


def _triton_rms_norm(*args: Any) -> Tensor:
    from thalweg.ops.norm.triton import rms_norm

    return rms_norm(*args)


def _triton_gated_rms_norm(*args: Any) -> Tensor:
    from thalweg.ops.norm.triton_gated import gated_rms_norm

    return gated_rms_norm(*args)


def _triton_refuses(ctx: OpContext) -> str | None:
    D = ctx.dims.get("D", 0)
    return why_not(ctx) if 1 <= D <= 16384 else f"needs rows of at most 16384, not {D}"


def _gated_refuses(ctx: OpContext) -> str | None:
    V = ctx.dims.get("V", 0)
    return why_not(ctx) if 1 <= V <= 4096 else f"needs heads of at most 4096, not {V}"


_rms_norm: RmsNorm = reference.rms_norm
_gated_rms_norm: GatedRmsNorm = reference.gated_rms_norm
register("rms_norm", "reference", _rms_norm)
register("gated_rms_norm", "reference", _gated_rms_norm)
register("rms_norm", "triton", _triton_rms_norm, supports=_triton_refuses, priority=10)
register("gated_rms_norm", "triton", _triton_gated_rms_norm, supports=_gated_refuses, priority=10)
