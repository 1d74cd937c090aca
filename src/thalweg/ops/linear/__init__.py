"""Ops "linear", "norm_linear" and "linear_add": x @ w.T without bias, alone, of a norm, and added to the residual."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.linear import reference
from thalweg.ops.registry import register
from thalweg.ops.triton_support import why_not


class Linear(Protocol):
    def __call__(self, x_TD: Tensor, w_OD: Tensor, /) -> Tensor:
        """y_TO = x_TD @ w_OD.T, accumulated in fp32 and rounded once to the dtype that x and w share.

        x and w have a unit last stride; y is contiguous. T may be 0.
        """


class NormLinear(Protocol):
    def __call__(self, x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_OD: Tensor, /) -> Tensor:
        """y_TO = "linear" of "rms_norm" of x_TD, which is rounded to the dtype in between."""


class LinearAdd(Protocol):
    def __call__(self, x_TD: Tensor, w_OD: Tensor, residual_TO: Tensor, /) -> Tensor:
        """y_TO = residual + x @ w.T. Whether the product is rounded to the dtype before it is added is open.

        The residual shares the dtype, and may be overwritten with the result.
        """


def _triton_linear(*args: Any) -> Tensor:
    from thalweg.ops.linear import triton

    return triton.linear(*args)


def _triton_norm_linear(*args: Any) -> Tensor:
    from thalweg.ops.linear import triton

    return triton.norm_linear(*args)


def _triton_linear_add(*args: Any) -> Tensor:
    from thalweg.ops.linear import triton

    return triton.linear_add(*args)


_linear: Linear = reference.linear
_kernel_linear: Linear = _triton_linear
_norm_linear: NormLinear = reference.norm_linear
_kernel_norm_linear: NormLinear = _triton_norm_linear
_linear_add: LinearAdd = reference.linear_add
_kernel_linear_add: LinearAdd = _triton_linear_add
register("linear", "reference", _linear)
register("linear", "triton", _kernel_linear, supports=why_not, priority=10)
register("norm_linear", "reference", _norm_linear)
register("norm_linear", "triton", _kernel_norm_linear, supports=why_not, priority=10)
register("linear_add", "reference", _linear_add)
register("linear_add", "triton", _kernel_linear_add, supports=why_not, priority=10)
