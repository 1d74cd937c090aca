"""Op "rms_norm", and `gated_rms_norm` of `reference` and `triton.gated`, a part of the mixers of gated delta rules.

Both compute in fp32 and round to the input dtype once, after the weight. Weights may be of another dtype.

    gated_rms_norm(o_THV, gate_THV, weight_V, eps, *, silu=False) -> y_THV

is rms_norm(o) * sigmoid(gate), or with `silu` SiLU(gate), normalised over the last dimension (each head by itself, of
at most 4096).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from thalweg.ops.norm import cpp, reference
from thalweg.ops.registry import Op, Refusal, Where, register
from thalweg.ops.toolchain import cpu_build
from thalweg.ops.toolchain.triton_support import why_not


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsNormDims:
    D: int  # width of a row


class RmsNorm(Protocol):
    def __call__(self, x_TD: Tensor, weight_D: Tensor, eps: float, /) -> Tensor:
        """y_TD = x / sqrt(mean(x^2) + eps) * weight over the last dimension; x is [..., D] with unit last stride."""


RMS_NORM: Op[RmsNormDims, RmsNorm] = Op("rms_norm", RmsNormDims)


Normed: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""What a norm gives, in x's dtype or in e4m3 over scales of rows."""


@dataclass(slots=True)
class NextNorm:
    """The norm that comes next of an op's result. An op that can compute it on the way puts "rms_norm" of the result
    into `normed_TD`; else that stays None. If what comes next multiplies in float8, it is `in_float8` instead, of few
    tokens: in e4m3 [T, D], over scales fp32 [T] of its rows."""

    weight_D: Tensor
    eps: float
    wants_float8: bool = False
    normed_TD: Tensor | None = None
    in_float8: tuple[Tensor, Tensor] | None = None

    @property
    def known(self) -> Normed | None:
        """What an op has put there."""
        return self.in_float8 if self.normed_TD is None else self.normed_TD


def _triton_rms_norm(where: Where, dims: RmsNormDims) -> RmsNorm:
    from thalweg.ops.norm.triton.rms import rms_norm

    return rms_norm


def _triton_refuses(where: Where, dims: RmsNormDims) -> Refusal:
    return why_not(where) if 1 <= dims.D <= 16384 else f"needs rows of at most 16384, not {dims.D}"


register(RMS_NORM, "reference", lambda *_: reference.rms_norm)
register(RMS_NORM, "cpp", lambda *_: cpp.rms_norm, supports=cpu_build.why_not, priority=10)
register(RMS_NORM, "triton", _triton_rms_norm, supports=_triton_refuses, priority=10)
