"""Op "silu_and_mul": the SwiGLU activation."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from thalweg.ops.activation import reference
from thalweg.ops.registry import register
from thalweg.ops.toolchain.triton_support import why_not


class SiluAndMul(Protocol):
    def __call__(self, x_T2I: Tensor, /) -> Tensor:
        """y_TI = silu(first half of x) * second half, in fp32, rounded once to x's dtype.

        x_T2I is [..., 2 * I]; y is [..., I].
        """


def _triton(x_T2I: Tensor) -> Tensor:
    from thalweg.ops.activation import triton

    return triton.silu_and_mul(x_T2I)


_silu_and_mul: SiluAndMul = reference.silu_and_mul
_triton_silu_and_mul: SiluAndMul = _triton
register("silu_and_mul", "reference", _silu_and_mul)
register("silu_and_mul", "triton", _triton_silu_and_mul, supports=why_not, priority=10)
