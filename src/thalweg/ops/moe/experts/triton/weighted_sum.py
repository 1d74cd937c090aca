"""The last launch of the experts: a token's weighted sum, and with it the own expert and the residual.

It takes the outputs of the (token, expert) pairs, whatever kernels they come from, in one fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.toolchain.triton_launch import pdl_options


@triton.jit
def weighted_sum_kernel(
    y_ptr,  # [T * K, D]
    weights_ptr,
    own_ptr,  # [T, D] of the own expert, or None
    residual_ptr,  # or None
    out_ptr,
    scale,  # of the weighted sum, if there is an own expert
    residual_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    ys, weights = (), ()
    for j in tl.static_range(K):
        ys = ys + (tl.load(y_ptr + (token * K + j) * D + cols, mask=inside, other=0.0),)
        weights = weights + (tl.load(weights_ptr + token * K + j),)
    own, residual = 0.0, 0.0
    if own_ptr is not None:
        own = tl.load(own_ptr + token * D + cols, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + token * residual_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if residual_stride < 0:  # never, but the assembler does not sink loads over a branch
        return
    total = tl.zeros([BLOCK_D], tl.float32)
    for j in tl.static_range(K):
        # What stands there for a pair that is left out may be anything.
        total += tl.where(weights[j] != 0, weights[j] * ys[j].to(tl.float32), 0.0)
    if own_ptr is not None:
        # Rounded where the additions by themselves round (op "scaled_residual_add").
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        total = tl.fma(total.to(dtype).to(tl.float32), scale, own.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    total += residual
    tl.store(out_ptr + token * D + cols, total.to(out_ptr.dtype.element_ty), mask=inside)


def weighted_sum(
    y_PD: Tensor,
    weights_Tk: Tensor,
    out_TD: Tensor,
    residual_TD: Tensor | None,
    own_TD: Tensor | None = None,
    scale: float = 1.0,
    block: int = 256,
    warps: int = 2,
) -> Tensor:
    """out_TD, rounded once to its dtype: the outputs [T * k, D] of all pairs, a token's k in a row, weighted and summed
    in fp32, plus the residual. With own_TD, the residual + (own + scale * the sum), each rounded. All but the residual
    are contiguous."""
    (T, K), D = weights_Tk.shape, y_PD.shape[1]
    weighted_sum_kernel[(T, triton.cdiv(D, block))](
        y_PD,
        weights_Tk,
        own_TD,
        residual_TD,
        out_TD,
        float(scale),
        0 if residual_TD is None else residual_TD.stride(0),
        D=D,
        K=K,
        BLOCK_D=block,
        num_warps=warps,
        **pdl_options(y_PD),
    )
    return out_TD
