"""Op "silu_and_mul": the SwiGLU activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from thalweg.ops.activation import cpp, reference
from thalweg.ops.registry import Op, Where, register
from thalweg.ops.toolchain import cpu_build
from thalweg.ops.toolchain.triton_support import why_not


@dataclass(frozen=True, slots=True, kw_only=True)
class SiluAndMulDims:
    I: int  # columns of y


class SiluAndMul(Protocol):
    def __call__(self, x_T2I: Tensor, /) -> Tensor:
        """y_TI = silu(first half of x) * second half, in fp32, rounded once to x's dtype.

        x_T2I is [..., 2 * I]; y is [..., I].
        """


SILU_AND_MUL: Op[SiluAndMulDims, SiluAndMul] = Op("silu_and_mul", SiluAndMulDims)


def _triton(where: Where, dims: SiluAndMulDims) -> SiluAndMul:
    from thalweg.ops.activation import triton

    return triton.silu_and_mul


register(SILU_AND_MUL, "reference", lambda *_: reference.silu_and_mul)
register(SILU_AND_MUL, "cpp", lambda *_: cpp.silu_and_mul, supports=cpu_build.why_not, priority=10)
register(SILU_AND_MUL, "triton", _triton, supports=why_not, priority=10)
