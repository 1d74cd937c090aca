"""Activations in float8 (e4m3): each row has a scale of its own, of any size. More scales in a row would not make a
float finer, only reach further down: what is below 2^-14 of its row's largest loses bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.toolchain.triton_launch import pdl_options
from thalweg.quant.blocks import BLOCK as _BLOCK

BLOCK = tl.constexpr(_BLOCK)
LARGEST = tl.constexpr(448.0)  # of e4m3
SMALLEST = tl.constexpr(2.0**-100)  # of the largest of a row that is told from 0
PADDING = 256  # rows of scales, of which a tile's are read whole


@triton.jit(do_not_specialize=["T", "O"])
def quantize_rows_kernel(
    x_ptr,
    norm_ptr,  # [D], or None
    q_ptr,
    x_scales_ptr,  # [T]
    scales_ptr,  # [O, BLOCKS] of weights, or None
    w_scales_ptr,  # [BLOCKS, w_scales_stride]
    T,
    O,
    x_stride,
    w_scales_stride,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCKS: tl.constexpr,  # of 128 columns
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_T rows of x, or of its RMSNorm. Programs beyond those of x: ROWS rows of weights' scales, transposed."""
    if PDL:
        gdc_launch_dependents()
    programs = (T + BLOCK_T - 1) // BLOCK_T
    if scales_ptr is not None:
        if tl.program_id(0) >= programs:
            if PDL:
                gdc_wait()
            o = (tl.program_id(0) - programs) * ROWS + tl.arange(0, ROWS)
            some = tl.arange(0, 16)
            for c in tl.static_range(0, BLOCKS, 16):
                here = (o < O)[:, None] & (c + some < BLOCKS)[None, :]
                from_ptrs = scales_ptr + o[:, None].to(tl.int64) * BLOCKS + c + some[None, :]
                scales = tl.load(from_ptrs, mask=here, other=0.0)
                tl.store(w_scales_ptr + (c + some)[None, :] * w_scales_stride + o[:, None], scales, mask=here)
            return
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < T)[:, None] & (d < D)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row[:, None].to(tl.int64) * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        factor = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
        x = (x * factor[:, None] * norm).to(x_ptr.dtype.element_ty).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 1), SMALLEST) * (1 / LARGEST)
    q = (x * (1 / scale)[:, None]).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + row[:, None].to(tl.int64) * D + d, q, mask=inside)
    tl.store(x_scales_ptr + row, scale, mask=row < T)


def quantize_rows(
    x_TD: Tensor, scale_OB: Tensor | None = None, norm: tuple[Tensor, float] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, or its RMSNorm of (weight_D, eps), over its scales in e4m3 [T, D]; its scales fp32 [T]; those of weights
    [D / 128, O], if they are given), scales with rows up to a multiple of PADDING, of anything.

    The largest of a row becomes 448. NaN stays NaN, and infinity becomes it. 128 divides D. x has a unit last stride.
    """
    (T, D), O = x_TD.shape, 0 if scale_OB is None else len(scale_OB)
    q_TD = torch.empty(T, D, dtype=torch.float8_e4m3fn, device=x_TD.device)
    blocks, rows = D // BLOCK.value, 32
    x_scales_T, w_scales_BO = (
        torch.empty(*n, triton.cdiv(most, PADDING) * PADDING, dtype=torch.float32, device=x_TD.device)
        for n, most in (((), T), ((blocks,), O))
    )
    norm_weight_D, eps = norm or (None, 0.0)
    width = triton.next_power_of_2(D)
    at_once = max(1, 4096 // width)  # a program per short row would take longer to start than to run
    quantize_rows_kernel[(triton.cdiv(T, at_once) + triton.cdiv(O, rows),)](
        x_TD,
        norm_weight_D,
        q_TD,
        x_scales_T,
        scale_OB,
        w_scales_BO,
        T,
        O,
        x_TD.stride(0),
        w_scales_BO.stride(0),
        eps,
        D=D,
        BLOCK_D=width,
        BLOCK_T=at_once,
        BLOCKS=blocks,
        ROWS=rows,
        num_warps=8,
        **pdl_options(x_TD),
    )
    return q_TD, x_scales_T, w_scales_BO
