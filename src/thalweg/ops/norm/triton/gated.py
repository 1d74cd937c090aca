"""gated_rms_norm as one Triton kernel over blocks of rows, a row being one head of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["rows"])
def gated_rms_norm_kernel(
    o_ptr,
    gate_ptr,
    weight_ptr,
    y_ptr,
    rows,
    o_stride,
    gate_stride,
    eps,
    H: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    v = tl.arange(0, BLOCK_V)
    inside = (row < rows)[:, None] & (v < V)[None, :]
    at = (row % H * V)[:, None] + v[None, :]
    o = tl.load(o_ptr + (row // H * o_stride)[:, None] + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + (row // H * gate_stride)[:, None] + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + v, mask=v < V, other=0.0).to(tl.float32)
    factor = tl.sigmoid(gate)
    if SILU:
        factor *= gate
    y = o * tl.rsqrt(tl.sum(o * o, 1) / V + eps)[:, None] * weight[None, :] * factor
    tl.store(y_ptr + row[:, None] * V + v[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def gated_rms_norm(o_THV: Tensor, gate_THV: Tensor, weight_V: Tensor, eps: float, *, silu: bool = False) -> Tensor:
    T, H, V = o_THV.shape
    o_THV, gate_THV = (x if x.stride()[1:] == (V, 1) else x.contiguous() for x in (o_THV, gate_THV))
    y_THV = torch.empty(T, H, V, dtype=o_THV.dtype, device=o_THV.device)
    if y_THV.numel():
        block = triton.next_power_of_2(V)
        rows = max(1, 4096 // block)
        gated_rms_norm_kernel[(triton.cdiv(T * H, rows),)](
            o_THV,
            gate_THV,
            weight_V,
            y_THV,
            T * H,
            o_THV.stride(0),
            gate_THV.stride(0),
            eps,
            H,
            V,
            block,
            rows,
            silu,
            num_warps=4,
        )
    return y_THV
