"""Op "norm_swiglu": the first half of a dense feed-forward block, from the norm to the activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.activation import SILU_AND_MUL, SiluAndMulDims
from thalweg.ops.linear import NORM_LINEAR, NormLinearDims, cuda, fused_gate_up_refuses, fused_gate_up_tokens
from thalweg.ops.registry import Op, Refusal, Resolver, Tokens, Where, register
from thalweg.ops.swiglu import reference


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSwigluDims:
    D: int  # columns of x
    I: int  # columns of y
    norm_fp32: bool = False  # whether the norm's weight is fp32 whatever x is

    @property
    def linear(self) -> NormLinearDims:
        """Of the projection by itself."""
        return NormLinearDims(D=self.D, parts=(self.I, self.I), norm_fp32=self.norm_fp32)


class NormSwiglu(Protocol):
    def __call__(self, x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_2ID: Tensor, /) -> Tensor:
        """y_TI = silu(n gate^T) * (n up^T) with n = "rms_norm" of x_TD, gate the upper half of w and up the other.

        Arguments are those of "norm_linear", and n is rounded as there. Whether both products are rounded to x's dtype
        in between is open. y is contiguous. T may be 0.
        """


NORM_SWIGLU: Op[NormSwigluDims, NormSwiglu] = Op("norm_swiglu", NormSwigluDims)


def _separate(where: Where, dims: NormSwigluDims) -> NormSwiglu:
    norm_linear = Resolver().resolve(NORM_LINEAR, where, dims.linear)
    silu_and_mul = Resolver().resolve(SILU_AND_MUL, where, SiluAndMulDims(I=dims.I))
    return lambda x_TD, norm_weight_D, eps, w_2ID: silu_and_mul(norm_linear(x_TD, norm_weight_D, eps, w_2ID))


def _matrix(where: Where, dims: NormSwigluDims) -> NormSwiglu:
    from thalweg.ops.linear import matrix

    return matrix.norm_swiglu


def _cuda_refuses(where: Where, dims: NormSwigluDims) -> Refusal:
    return fused_gate_up_refuses("cuda", where, dims.linear)


def _matrix_refuses(where: Where, dims: NormSwigluDims) -> Refusal:
    return fused_gate_up_refuses("matrix", where, dims.linear)


def _few(dims: NormSwigluDims) -> Tokens:
    return fused_gate_up_tokens("cuda", dims.linear)


def _some(dims: NormSwigluDims) -> Tokens:
    return fused_gate_up_tokens("matrix", dims.linear)


register(NORM_SWIGLU, "reference", lambda *_: reference.norm_swiglu)
register(NORM_SWIGLU, "separate", _separate, priority=10)
register(NORM_SWIGLU, "matrix", _matrix, supports=_matrix_refuses, tokens=_some, priority=15)
register(NORM_SWIGLU, "cuda", lambda *_: cuda.norm_swiglu, supports=_cuda_refuses, tokens=_few, priority=20)
