"""silu_and_mul as one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def silu_and_mul_kernel(x_ptr, y_ptr, x_stride, I, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * x_stride + i, mask=i < I, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + I + i, mask=i < I, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * I + i, y.to(y_ptr.dtype.element_ty), mask=i < I)


def silu_and_mul(x_T2I: Tensor) -> Tensor:
    I = x_T2I.shape[-1] // 2
    x = x_T2I.reshape(-1, 2 * I)
    x = x if x.stride(1) == 1 else x.contiguous()
    y_TI = torch.empty(*x_T2I.shape[:-1], I, dtype=x.dtype, device=x.device)
    if y_TI.numel():
        block = min(1024, triton.next_power_of_2(I))
        silu_and_mul_kernel[(x.shape[0], triton.cdiv(I, block))](x, y_TI, x.stride(0), I, block, num_warps=4)
    return y_TI
