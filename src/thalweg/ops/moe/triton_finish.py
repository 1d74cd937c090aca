"""The last launch of the experts: a token's weighted sum, and with it the residual add and the next layer's norm.

It takes the fp32 outputs of the (token, expert) pairs, whatever kernels they come from, in one fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.norm.triton import rms_scale, row_block
from thalweg.ops.triton_launch import pdl_options


@triton.jit
def _weighted_sum(y_ptr, weights_ptr, token, cols, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr):
    total = tl.zeros([BLOCK_D], tl.float32)
    for j in tl.static_range(K):
        y = tl.load(y_ptr + (token * K + j) * D + cols, mask=cols < D, other=0.0)
        total += tl.load(weights_ptr + token * K + j) * y
    return total


@triton.jit
def sum_kernel(
    y_ptr,  # [T * K, D] fp32
    weights_ptr,
    out_ptr,
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
    total = _weighted_sum(y_ptr, weights_ptr, token, cols, D, K, BLOCK_D)
    tl.store(out_ptr + token * D + cols, total.to(out_ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def sum_add_norm_kernel(
    y_ptr,  # [T * K, D] fp32
    weights_ptr,
    residual_ptr,
    norm_ptr,
    normed_ptr,
    sum_ptr,
    residual_stride,
    eps,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a token."""
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    norm_weight = tl.load(norm_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    residual = tl.load(residual_ptr + token * residual_stride + cols, mask=inside, other=0.0).to(tl.float32)
    total = _weighted_sum(y_ptr, weights_ptr, token, cols, D, K, BLOCK_D)
    # Rounded where the experts' output and the sum would be stored between separate kernels: the bits are theirs.
    summed = (total.to(sum_ptr.dtype.element_ty).to(tl.float32) + residual).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + token * D + cols, summed, mask=inside)
    row = summed.to(tl.float32)
    y = row * rms_scale(row, eps, D) * norm_weight
    tl.store(normed_ptr + token * D + cols, y.to(normed_ptr.dtype.element_ty), mask=inside)


def weighted_sum(y_PD: Tensor, weights_Tk: Tensor, dtype: torch.dtype, block: int = 256) -> Tensor:
    """[T, D] in `dtype` of the fp32 outputs [T * k, D] of all pairs, a token's k in a row."""
    (T, K), D = weights_Tk.shape, y_PD.shape[1]
    y_TD = torch.empty(T, D, dtype=dtype, device=y_PD.device)
    sum_kernel[(T, triton.cdiv(D, block))](
        y_PD, weights_Tk, y_TD, D=D, K=K, BLOCK_D=block, num_warps=2, **pdl_options(y_PD)
    )
    return y_TD


def sum_add_norm(
    y_PD: Tensor, weights_Tk: Tensor, residual_TD: Tensor, norm_weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(rms_norm(r), r), r_TD = weighted_sum + residual: the bits of the three ops by themselves."""
    (T, K), D = weights_Tk.shape, y_PD.shape[1]
    normed_TD, sum_TD = (torch.empty(T, D, dtype=residual_TD.dtype, device=y_PD.device) for _ in range(2))
    block, warps = row_block(D)
    sum_add_norm_kernel[(T,)](
        y_PD,
        weights_Tk,
        residual_TD,
        norm_weight_D,
        normed_TD,
        sum_TD,
        residual_TD.stride(0),
        eps,
        D=D,
        K=K,
        BLOCK_D=block,
        num_warps=warps,
        **pdl_options(y_PD),
    )
    return normed_TD, sum_TD
