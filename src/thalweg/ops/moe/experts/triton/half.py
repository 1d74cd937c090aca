"""Activations in fp16, or in fp8, for products with weights in fp8.

From e4m3 to fp16 there is one instruction for two elements; to bf16 it takes four. So x goes to fp16, each row scaled
by a power of two to just below fp16's largest: it loses nothing but what is below 2^-29 of the row's largest element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.ops.products.triton import LARGEST, SMALLEST


@triton.jit
def store_half_row(x_ptr, half_ptr, scale_ptr, token, x_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A row of x in fp16, times a power of two, and the inverse of that."""
    cols = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + token * x_stride + cols, mask=cols < D, other=0.0).to(tl.float32)
    # The powers of two are put together from their bits: the largest lands in [2^14, 2^15), and NaN stays NaN.
    exponent = tl.max(tl.abs(x), 0).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 15), 253)
    x *= ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(half_ptr + token * D + cols, x.to(tl.float16), mask=cols < D)
    tl.store(scale_ptr + token, ((exponent - 14) << 23).to(tl.float32, bitcast=True))


@triton.jit
def store_narrow_row(x_ptr, narrow_ptr, scale_ptr, token, x_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A row of x over its scale in e4m3, of which its largest becomes the largest, and that scale."""
    cols = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + token * x_stride + cols, mask=cols < D, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0), SMALLEST) * (1 / LARGEST)
    tl.store(narrow_ptr + token * D + cols, (x * (1 / scale)).to(narrow_ptr.dtype.element_ty), mask=cols < D)
    tl.store(scale_ptr + token, scale)


@triton.jit
def half_kernel(x_ptr, half_ptr, scale_ptr, x_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    store_half_row(x_ptr, half_ptr, scale_ptr, tl.program_id(0).to(tl.int64), x_stride, D, BLOCK_D)


def in_half(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(x in fp16, each row times a power of two; the inverse of that, fp32 [T])."""
    T, D = x_TD.shape
    half_TD = torch.empty(T, D, dtype=torch.float16, device=x_TD.device)
    scale_T = torch.empty(T, device=x_TD.device)
    half_kernel[(T,)](x_TD, half_TD, scale_T, x_TD.stride(0), D=D, BLOCK_D=triton.next_power_of_2(D), num_warps=4)
    return half_TD, scale_T
