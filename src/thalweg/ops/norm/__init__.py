"""Ops "rms_norm" and "gated_rms_norm".

Both compute in fp32 and round to the input dtype once, after the weight. Weights may be of another dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.norm import reference
from thalweg.ops.registry import Op, Refusal, Where, register
from thalweg.ops.toolchain.triton_support import why_not


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsNormDims:
    D: int  # width of a row


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedRmsNormDims:
    H: int
    V: int  # width of a head


class RmsNorm(Protocol):
    def __call__(self, x_TD: Tensor, weight_D: Tensor, eps: float, /) -> Tensor:
        """y_TD = x / sqrt(mean(x^2) + eps) * weight over the last dimension; x is [..., D] with unit last stride."""


class GatedRmsNorm(Protocol):
    def __call__(
        self, o_THV: Tensor, gate_THV: Tensor, weight_V: Tensor, eps: float, /, *, silu: bool = False
    ) -> Tensor:
        """y_THV = rms_norm(o) * sigmoid(gate), or with `silu` SiLU(gate), normalised over the last dimension (each head
        by itself)."""


RMS_NORM: Op[RmsNormDims, RmsNorm] = Op("rms_norm", RmsNormDims)
GATED_RMS_NORM: Op[GatedRmsNormDims, GatedRmsNorm] = Op("gated_rms_norm", GatedRmsNormDims)


def _triton_rms_norm(where: Where, dims: RmsNormDims) -> RmsNorm:
    from thalweg.ops.norm.triton.rms import rms_norm

    return rms_norm


def _triton_gated_rms_norm(where: Where, dims: GatedRmsNormDims) -> GatedRmsNorm:
    from thalweg.ops.norm.triton.gated import gated_rms_norm

    return gated_rms_norm


def _triton_refuses(where: Where, dims: RmsNormDims) -> Refusal:
    return why_not(where) if 1 <= dims.D <= 16384 else f"needs rows of at most 16384, not {dims.D}"


def _gated_refuses(where: Where, dims: GatedRmsNormDims) -> Refusal:
    return why_not(where) if 1 <= dims.V <= 4096 else f"needs heads of at most 4096, not {dims.V}"


register(RMS_NORM, "reference", lambda *_: reference.rms_norm)
register(RMS_NORM, "triton", _triton_rms_norm, supports=_triton_refuses, priority=10)
register(GATED_RMS_NORM, "reference", lambda *_: reference.gated_rms_norm)
register(GATED_RMS_NORM, "triton", _triton_gated_rms_norm, supports=_gated_refuses, priority=10)
