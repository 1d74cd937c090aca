"""Ops "linear", "norm_linear" and "linear_add": x @ w.T without bias, alone, of a norm, and added to the residual."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.linear import reference
from thalweg.ops.registry import OpContext, register
from thalweg.ops.toolchain import cuda_build
from thalweg.ops.toolchain.triton_support import why_not, why_not_hopper


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


def _triton_norm_linear(*args: Any) -> Tensor:
    from thalweg.ops.linear import triton

    return triton.norm_linear(*args)


def _triton_linear_add(*args: Any) -> Tensor:
    from thalweg.ops.linear import triton

    return triton.linear_add(*args)


def _cuda_linear(*args: Any) -> Tensor:
    from thalweg.ops.linear import cuda

    return cuda.linear(*args)


def _cuda_norm_linear(*args: Any) -> Tensor:
    from thalweg.ops.linear import cuda

    return cuda.norm_linear(*args)


def _cuda_linear_add(*args: Any) -> Tensor:
    from thalweg.ops.linear import cuda

    return cuda.linear_add(*args)


MAX_COLUMNS = 4096  # of 16 tokens are what the registers of a block hold


def _cuda_refuses(ctx: OpContext) -> str | None:
    D = ctx.dims.get("D", 0)
    if D % 32 or not 0 < D <= MAX_COLUMNS:
        return f"needs D to be a multiple of 32 up to {MAX_COLUMNS}, not {D}"
    if ctx.dtype != "bfloat16":
        return f"needs bfloat16, not {ctx.dtype}"
    return why_not(ctx) or cuda_build.why_not(ctx) or why_not_hopper()


_linear: Linear = reference.linear
_kernel_linear: Linear = _cuda_linear
_norm_linear: NormLinear = reference.norm_linear
_library_norm_linear: NormLinear = _triton_norm_linear
_kernel_norm_linear: NormLinear = _cuda_norm_linear
_linear_add: LinearAdd = reference.linear_add
_library_linear_add: LinearAdd = _triton_linear_add
_kernel_linear_add: LinearAdd = _cuda_linear_add
register("linear", "reference", _linear)
register("linear", "cuda", _kernel_linear, supports=_cuda_refuses, priority=20)
register("norm_linear", "reference", _norm_linear)
register("norm_linear", "triton", _library_norm_linear, supports=why_not, priority=10)
register("norm_linear", "cuda", _kernel_norm_linear, supports=_cuda_refuses, priority=20)
register("linear_add", "reference", _linear_add)
register("linear_add", "triton", _library_linear_add, supports=why_not, priority=10)
register("linear_add", "cuda", _kernel_linear_add, supports=_cuda_refuses, priority=20)
