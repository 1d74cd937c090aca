"""Op "linear": x @ w.T without bias."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from thalweg.ops.linear import reference
from thalweg.ops.registry import register
from thalweg.ops.triton_support import why_not


class Linear(Protocol):
    def __call__(self, x_TD: Tensor, w_OD: Tensor, /) -> Tensor:
        """y_TO = x_TD @ w_OD.T, accumulated in fp32 and rounded once to the dtype that x and w share.

        x and w have a unit last stride; y is contiguous. T may be 0.
        """


def _triton(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    from thalweg.ops.linear import triton

    return triton.linear(x_TD, w_OD)


_linear: Linear = reference.linear
_triton_linear: Linear = _triton
register("linear", "reference", _linear)
register("linear", "triton", _triton_linear, supports=why_not, priority=10)
