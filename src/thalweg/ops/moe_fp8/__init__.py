"""Op "experts_fp8": the experts over weights in fp8 with one scale per block."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from thalweg.ops.moe import ExpertsDims
from thalweg.ops.moe_fp8 import reference
from thalweg.ops.registry import Op, Refusal, Tokens, Where, register
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
        *,
        residual_TD: Tensor | None = None,
        num_shared: int = 0,
    ) -> Tensor:
        """y_TD as op "experts" gives it for w = q * the scale of its block of 128 x 128 (`blocks.quantize`).

        q_gate_up_E2ID [E, 2I, D] and q_down_EDI [E, D, I] are float8_e4m3fn. Scales are fp32 powers of two, so that w
        is exact in x's dtype: s_down [E, ceil(D / 128), ceil(I / 128)]; s_gate_up [E, 2 ceil(I / 128), ceil(D / 128)],
        whose halves belong to gate and up: where 128 does not divide I, up's first block begins at its first row.
        The other arguments and y are as in "experts"; activations are not quantized.
        """


EXPERTS_FP8: Op[ExpertsDims, ExpertsFp8] = Op("experts_fp8", ExpertsDims)

MAX_WIDTH = 16384  # one program holds a token's row in registers
MAX_EXPERTS = 1024  # a block of the CUDA C++ kernels has all of them in shared memory
MAX_WARPS = 12


def _triton_refuses(where: Where, dims: ExpertsDims) -> Refusal:
    if dims.D > MAX_WIDTH:
        return f"needs rows of at most {MAX_WIDTH}, not {dims.D}"
    return why_not(where)


def steps_per_warp(columns: int) -> int | None:
    """Blocks of 128 columns for a warp in CUDA C++, as few as MAX_WARPS allow; None for more than two, or a rest."""
    blocks, rest = divmod(columns, BLOCK)
    fitting = [steps for steps in (1, 2) if blocks % steps == 0 and blocks <= steps * MAX_WARPS]
    return fitting[0] if fitting and blocks and not rest else None


def _cuda_refuses(where: Where, dims: ExpertsDims) -> Refusal:
    if dims.E > MAX_EXPERTS:
        return f"needs at most {MAX_EXPERTS} experts, not {dims.E}"
    if steps_per_warp(dims.D) is None or steps_per_warp(dims.I) is None:
        return f"needs D and I of up to 12, or an even number up to 24, times 128, not {dims.D} and {dims.I}"
    if where.dtype != "bfloat16":
        return f"needs bfloat16, not {where.dtype}"
    return cuda_build.why_not(where) or why_not(where)  # Triton's for the sum


def _cuda(where: Where, dims: ExpertsDims) -> ExpertsFp8:
    from thalweg.ops.moe_fp8 import cuda_experts

    return cuda_experts.experts_fp8


def _pairs(where: Where, dims: ExpertsDims) -> ExpertsFp8:
    from thalweg.ops.moe_fp8.triton import experts

    return experts.experts_of_pairs


def _tiles(where: Where, dims: ExpertsDims) -> ExpertsFp8:
    from thalweg.ops.moe_fp8.triton import experts

    return experts.experts_of_tiles


def _grouped(where: Where, dims: ExpertsDims) -> ExpertsFp8:
    from thalweg.ops.moe_fp8.triton import grouped

    return grouped.experts_grouped


register(EXPERTS_FP8, "reference", lambda *_: reference.experts_fp8, capturable=False)
register(EXPERTS_FP8, "grouped", _grouped, supports=_triton_refuses, priority=10)
register(EXPERTS_FP8, "tiles", _tiles, supports=_triton_refuses, tokens=Tokens(last=256), priority=20)
register(EXPERTS_FP8, "pairs", _pairs, supports=_triton_refuses, tokens=Tokens(last=4), priority=30)
register(EXPERTS_FP8, "cuda", _cuda, supports=_cuda_refuses, tokens=Tokens(last=16), priority=40)
