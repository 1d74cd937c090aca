"""Activations in float8 (e4m3): each 128 columns of a row have a scale of their own, of any size."""

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
SMALLEST = tl.constexpr(2.0**-100)  # of the largest of 128 columns that is told from 0
PADDING = 256  # rows of transposed scales, of which a tile's are read whole


@triton.jit
def _store_quantized(x, q_ptrs, scale_ptrs, inside):
    """x [blocks, BLOCK] in fp32."""
    scale = tl.maximum(tl.max(tl.abs(x), 1), SMALLEST) * (1 / LARGEST)
    q = (x * (1 / scale)[:, None]).to(q_ptrs.dtype.element_ty)
    tl.store(q_ptrs, q, mask=inside[:, None])
    tl.store(scale_ptrs, scale, mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def quantize_blocks_kernel(x_ptr, q_ptr, scales_ptr, blocks, BLOCKS: tl.constexpr, PDL: tl.constexpr):
    """Of x whose rows follow one another."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    at = b[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + at, mask=(b < blocks)[:, None], other=0.0).to(tl.float32)
    _store_quantized(x, q_ptr + at, scales_ptr + b, b < blocks)


@triton.jit(do_not_specialize=["T", "O"])
def quantize_rows_kernel(
    x_ptr,
    norm_ptr,  # [D], or None
    q_ptr,
    x_scales_ptr,  # [blocks of D, x_scales_stride]
    scales_ptr,  # [O, blocks of D] of weights
    w_scales_ptr,  # [blocks of D, w_scales_stride]
    T,
    O,
    x_stride,
    x_scales_stride,
    w_scales_stride,
    eps,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,  # at least those of D
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row of x, or of its RMSNorm. Programs beyond those of T rows: ROWS rows of weights' scales, transposed."""
    if PDL:
        gdc_launch_dependents()
    blocks: tl.constexpr = D // BLOCK
    if tl.program_id(0) >= T:
        if PDL:
            gdc_wait()
        o = (tl.program_id(0) - T) * ROWS + tl.arange(0, ROWS)
        some = tl.arange(0, 16)
        for c in tl.static_range(0, blocks, 16):
            here = (o < O)[:, None] & (c + some < blocks)[None, :]
            scales = tl.load(scales_ptr + o[:, None].to(tl.int64) * blocks + c + some[None, :], mask=here, other=0.0)
            tl.store(w_scales_ptr + (c + some)[None, :] * w_scales_stride + o[:, None], scales, mask=here)
        return
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCKS)
    column = b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = b < blocks
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + column, mask=inside[:, None], other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + column, mask=inside[:, None], other=0.0)
    if norm_ptr is not None:
        wide = x.to(tl.float32)
        x = (wide * tl.rsqrt(tl.sum(tl.sum(wide * wide, 1), 0) / D + eps) * norm).to(x.dtype)
    _store_quantized(x.to(tl.float32), q_ptr + row * D + column, x_scales_ptr + b * x_scales_stride + row, inside)


def quantize_blocks(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(x over its scales in e4m3 [T, D], scales fp32 [T, D / 128]): the largest of 128 columns becomes 448. NaN stays
    NaN, and infinity becomes it. 128 divides D."""
    T, D = x_TD.shape
    q_TD = torch.empty(T, D, dtype=torch.float8_e4m3fn, device=x_TD.device)
    scales_TB = torch.empty(T, D // BLOCK.value, dtype=torch.float32, device=x_TD.device)
    blocks, each = scales_TB.numel(), 32
    quantize_blocks_kernel[(triton.cdiv(blocks, each),)](
        x_TD.contiguous(), q_TD, scales_TB, blocks, BLOCKS=each, num_warps=4, **pdl_options(x_TD)
    )
    return q_TD, scales_TB


def quantize_rows(
    x_TD: Tensor, scale_OB: Tensor, norm: tuple[Tensor, float] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, or its RMSNorm of (weight_D, eps), as `quantize_blocks` does it; its scales [D / 128, T] and those of weights
    [D / 128, O]) with rows up to a multiple of PADDING, of anything. x has a unit last stride."""
    (T, D), O = x_TD.shape, len(scale_OB)
    q_TD = torch.empty(T, D, dtype=torch.float8_e4m3fn, device=x_TD.device)
    blocks, rows = D // BLOCK.value, 32
    x_scales_BT, w_scales_BO = (
        torch.empty(blocks, triton.cdiv(n, PADDING) * PADDING, dtype=torch.float32, device=x_TD.device) for n in (T, O)
    )
    norm_weight_D, eps = norm or (None, 0.0)
    places = triton.next_power_of_2(blocks)
    quantize_rows_kernel[(T + triton.cdiv(O, rows),)](
        x_TD,
        norm_weight_D,
        q_TD,
        x_scales_BT,
        scale_OB,
        w_scales_BO,
        T,
        O,
        x_TD.stride(0),
        x_scales_BT.stride(0),
        w_scales_BO.stride(0),
        eps,
        D=D,
        BLOCKS=places,
        ROWS=rows,
        num_warps=min(8, max(1, places // 4)),
        **pdl_options(x_TD),
    )
    return q_TD, x_scales_BT, w_scales_BO
