"""Op "scaled_residual_add": routed experts scaled, shared experts and residual added, in one pass (Kimi-K2)."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.registry import register
from thalweg.ops.residual import reference
from thalweg.ops.toolchain.triton_support import why_not


class ScaledResidualAdd(Protocol):
    def __call__(self, residual_TD: Tensor, a_TD: Tensor, b_TD: Tensor, scale: float, /) -> Tensor:
        """y_TD = residual + (a + scale * b), of contiguous tensors of one shape and dtype, which y has too.

        Sums are in fp32, scale * b + a with one rounding. It is rounded to the dtype before the residual is added: the
        bits are those of the two additions by themselves.
        """


def _triton(*args: Any) -> Tensor:
    from thalweg.ops.residual.triton import scaled_residual_add

    return scaled_residual_add(*args)


_add: ScaledResidualAdd = reference.scaled_residual_add
_kernel: ScaledResidualAdd = _triton
register("scaled_residual_add", "reference", _add)
register("scaled_residual_add", "triton", _kernel, supports=why_not, priority=10)
