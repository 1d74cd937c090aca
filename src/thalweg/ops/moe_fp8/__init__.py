"""Ops "experts_fp8" and "experts_fp8_add": the experts over weights in fp8 with one scale a block."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from thalweg.ops.moe_fp8 import reference
from thalweg.ops.registry import OpContext, register
from thalweg.ops.toolchain import cuda_build
from thalweg.ops.toolchain.triton_support import why_not
from thalweg.quant.fp8 import BLOCK


class ExpertsFp8(Protocol):
    def __call__(
        self,
        x_TD: Tensor,
        weights_Tk: Tensor,
        ids_Tk: Tensor,
        q_gate_up_E2ID: Tensor,
        s_gate_up: Tensor,
        q_down_EDI: Tensor,
        s_down: Tensor,
        /,
        num_shared: int = 0,
    ) -> Tensor:
        """y_TD as op "experts" gives it for w = q * the scale of its block of 128 x 128 (`blocks.quantize`).

        q_gate_up_E2ID [E, 2I, D] and q_down_EDI [E, D, I] are float8_e4m3fn. Scales are fp32 powers of two, so that w
        is exact in x's dtype: s_down [E, ceil(D / 128), ceil(I / 128)]; s_gate_up [E, 2 ceil(I / 128), ceil(D / 128)],
        whose halves belong to gate and up: where 128 does not divide I, up's first block begins at its first row.
        x, y, weights_Tk, ids_Tk and num_shared are as in "experts"; activations are not quantized.
        """


class ExpertsFp8Add(Protocol):
    def __call__(
        self,
        x_TD: Tensor,
        weights_Tk: Tensor,
        ids_Tk: Tensor,
        q_gate_up_E2ID: Tensor,
        s_gate_up: Tensor,
        q_down_EDI: Tensor,
        s_down: Tensor,
        residual_TD: Tensor,
        /,
        num_shared: int = 0,
    ) -> Tensor:
        """residual_TD + "experts_fp8" of the rest, as "experts_add"."""


def _triton_experts(*args: Any, **options: Any) -> Tensor:
    from thalweg.ops.moe_fp8 import triton_experts

    return triton_experts.experts_fp8(*args, **options)


def _triton_experts_add(*args: Any, **options: Any) -> Tensor:
    from thalweg.ops.moe_fp8 import triton_experts

    return triton_experts.experts_fp8_add(*args, **options)


def _cuda_experts(*args: Any, **options: Any) -> Tensor:
    from thalweg.ops.moe_fp8 import cuda_experts

    return cuda_experts.experts_fp8(*args, **options)


def _cuda_experts_add(*args: Any, **options: Any) -> Tensor:
    from thalweg.ops.moe_fp8 import cuda_experts

    return cuda_experts.experts_fp8_add(*args, **options)


MAX_WIDTH = 16384  # one program holds a token's row in registers


def _supports(ctx: OpContext) -> str | None:
    if ctx.dims.get("D", 0) > MAX_WIDTH:
        return f"needs rows of at most {MAX_WIDTH}, not {ctx.dims['D']}"
    return why_not(ctx)


MAX_EXPERTS = 1024  # a block of the CUDA C++ kernels has all of them in shared memory
MAX_WARPS = 12


def steps_per_warp(columns: int) -> int | None:
    """Blocks of 128 columns for a warp in CUDA C++, as few as MAX_WARPS allow; None for more than two, or a rest."""
    blocks, rest = divmod(columns, BLOCK)
    fitting = [steps for steps in (1, 2) if blocks % steps == 0 and blocks <= steps * MAX_WARPS]
    return fitting[0] if fitting and blocks and not rest else None


def _cuda_supports(ctx: OpContext) -> str | None:
    E, D, I = (ctx.dims.get(name, 0) for name in "EDI")
    if E > MAX_EXPERTS:
        return f"needs at most {MAX_EXPERTS} experts, not {E}"
    if steps_per_warp(D) is None or steps_per_warp(I) is None:
        return f"needs D and I of up to 12, or an even number up to 24, times 128, not {D} and {I}"
    if ctx.dtype != "bfloat16":
        return f"needs bfloat16, not {ctx.dtype}"
    return cuda_build.why_not(ctx) or why_not(ctx)  # Triton's for the sum


_reference: ExpertsFp8 = reference.experts_fp8
_kernel: ExpertsFp8 = _triton_experts
_cuda: ExpertsFp8 = _cuda_experts
_reference_add: ExpertsFp8Add = reference.experts_fp8_add
_kernel_add: ExpertsFp8Add = _triton_experts_add
_cuda_add: ExpertsFp8Add = _cuda_experts_add
register("experts_fp8", "reference", _reference, capturable=False)
register("experts_fp8", "triton", _kernel, supports=_supports, priority=10)
register("experts_fp8", "cuda", _cuda, supports=_cuda_supports, priority=20)
register("experts_fp8_add", "reference", _reference_add, capturable=False)
register("experts_fp8_add", "triton", _kernel_add, supports=_supports, priority=10)
register("experts_fp8_add", "cuda", _cuda_add, supports=_cuda_supports, priority=20)
