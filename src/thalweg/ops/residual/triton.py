"""Both additions as one Triton kernel over the flattened elements."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.toolchain.triton_launch import pdl_options

BLOCK = 1024  # 16 bytes of bf16 for each of 128 threads


@triton.jit
def _scaled_residual_add(residual_ptr, a_ptr, b_ptr, y_ptr, scale, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    a = tl.load(a_ptr + i, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + i, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + i, mask=inside, other=0.0).to(tl.float32)
    # Said outright, not left to the compiler: torch's scaled addition is one fused multiply-add too.
    total = tl.fma(b, scale, a).to(y_ptr.dtype.element_ty)
    y = residual + total.to(tl.float32)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=inside)


def scaled_residual_add(residual_TD: Tensor, a_TD: Tensor, b_TD: Tensor, scale: float) -> Tensor:
    y_TD = torch.empty_like(residual_TD)
    size = y_TD.numel()
    if size:
        grid = (triton.cdiv(size, BLOCK),)
        options = pdl_options(y_TD)
        _scaled_residual_add[grid](residual_TD, a_TD, b_TD, y_TD, scale, size, BLOCK, num_warps=4, **options)
    return y_TD
