"""kda_gate as one Triton kernel over blocks of rows, a row being one head of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["rows"])
def kda_gate_kernel(
    f_ptr,
    A_log_ptr,
    dt_bias_ptr,
    g_ptr,
    rows,
    f_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    here = row < rows
    inside = here[:, None] & (k < K)[None, :]
    at = (row % H * K)[:, None] + k[None, :]
    x = tl.load(f_ptr + (row // H * f_stride)[:, None] + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(dt_bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    rate = -tl.exp(tl.load(A_log_ptr + row % H, mask=here, other=0.0).to(tl.float32))
    # softplus(x) = max(x, 0) + log(1 + e); times e / ((1 + e) - 1), which undoes the rounding of 1 + e.
    e = tl.exp(-tl.abs(x))
    one_e = 1.0 + e
    log1p = tl.where(one_e == 1.0, e, tl.log(one_e) * (e / tl.where(one_e == 1.0, 1.0, one_e - 1.0)))
    softplus = tl.maximum(x, 0.0) + log1p
    tl.store(g_ptr + row[:, None] * K + k[None, :], rate[:, None] * softplus, mask=inside)


def kda_gate(f_THK: Tensor, A_log_H: Tensor, dt_bias_HK: Tensor) -> Tensor:
    T, H, K = f_THK.shape
    f_THK = f_THK if f_THK.stride()[1:] == (K, 1) else f_THK.contiguous()
    g_THK = torch.empty(T, H, K, dtype=torch.float32, device=f_THK.device)
    if g_THK.numel():
        block = triton.next_power_of_2(K)
        rows = max(1, 4096 // block)
        grid = (triton.cdiv(T * H, rows),)
        kda_gate_kernel[grid](f_THK, A_log_H, dt_bias_HK, g_THK, T * H, f_THK.stride(0), H, K, block, rows, num_warps=4)
    return g_THK
