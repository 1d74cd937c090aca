"""Experts in fp8 for the many tokens of a prefill: ops/moe/triton_grouped.py with weights widened tile by tile.

Arithmetic bounds these, not the weights' way from memory: a weight takes its scale as it is widened, exactly, and the
sums run through all columns in one accumulator.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.config.quantization import BLOCK as _BLOCK
from thalweg.ops.moe.triton_grouped import rows_per_block, sort_pairs
from thalweg.ops.triton_dot import dot

BLOCK = tl.constexpr(_BLOCK)
SLICE = 8192  # tokens at a time: what is kept in between is at most this many rows for each expert of a token


@triton.jit
def gate_up_grouped_kernel(
    x_ptr,
    sorted_ptr,
    blocks_ptr,
    q_ptr,  # [E, 2I, D] e4m3
    s_ptr,  # [E, 2 * blocks of I, blocks of D]
    h_ptr,  # [T * K, I], by expert
    x_stride,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,  # divides BLOCK
    BLOCK_D: tl.constexpr,  # divides BLOCK
    STAGES: tl.constexpr,
):
    tiles: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    blocks_d: tl.constexpr = (D + BLOCK - 1) // BLOCK
    blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
    block = tl.program_id(0) // tiles
    count = tl.load(blocks_ptr + 3 * block + 2)
    if count == 0:
        return
    expert = tl.load(blocks_ptr + 3 * block).to(tl.int64)
    first = tl.load(blocks_ptr + 3 * block + 1)
    m = tl.arange(0, ROWS)
    i = (tl.program_id(0) % tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    d = tl.arange(0, BLOCK_D)
    token = tl.load(sorted_ptr + first + m, mask=m < count, other=0).to(tl.int64) // K
    x_ptrs = x_ptr + token[:, None] * x_stride + d[None, :]
    q_ptrs = q_ptr + expert * (2 * I * D) + tl.minimum(i, I - 1)[None, :] * D + d[:, None]
    s_ptr += (expert * (2 * blocks_i) + (tl.program_id(0) % tiles) * BLOCK_I // BLOCK) * blocks_d
    gate = tl.zeros([ROWS, BLOCK_I], tl.float32)
    up = tl.zeros([ROWS, BLOCK_I], tl.float32)
    for at in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        gate_scale = tl.load(s_ptr + at // BLOCK)
        up_scale = tl.load(s_ptr + blocks_i * blocks_d + at // BLOCK)
        if D % BLOCK_D == 0:
            x = tl.load(x_ptrs + at)
            q_gate = tl.load(q_ptrs + at)
            q_up = tl.load(q_ptrs + at + I * D)
        else:
            x = tl.load(x_ptrs + at, mask=at + d[None, :] < D, other=0.0)
            q_gate = tl.load(q_ptrs + at, mask=at + d[:, None] < D, other=0.0)
            q_up = tl.load(q_ptrs + at + I * D, mask=at + d[:, None] < D, other=0.0)
        gate += dot(x, (q_gate.to(tl.float32) * gate_scale).to(x.dtype))
        up += dot(x, (q_up.to(tl.float32) * up_scale).to(x.dtype))
    h = gate * tl.sigmoid(gate) * up
    h_ptrs = h_ptr + (first + m).to(tl.int64)[:, None] * I + i[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=(m < count)[:, None] & (i < I)[None, :])


@triton.jit
def down_grouped_kernel(
    h_ptr,
    sorted_ptr,
    blocks_ptr,
    q_ptr,  # [E, D, I] e4m3
    s_ptr,  # [E, blocks of D, blocks of I]
    y_ptr,  # [T * K, D], by token
    D: tl.constexpr,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,  # divides BLOCK
    STAGES: tl.constexpr,
):
    tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    blocks_d: tl.constexpr = (D + BLOCK - 1) // BLOCK
    blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
    block = tl.program_id(0) // tiles
    count = tl.load(blocks_ptr + 3 * block + 2)
    if count == 0:
        return
    expert = tl.load(blocks_ptr + 3 * block).to(tl.int64)
    first = tl.load(blocks_ptr + 3 * block + 1)
    m = tl.arange(0, ROWS)
    d = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.minimum(d, D - 1)
    i = tl.arange(0, BLOCK_I)
    h_ptrs = h_ptr + (first + tl.minimum(m, count - 1)).to(tl.int64)[:, None] * I + i[None, :]
    q_ptrs = q_ptr + expert * (D * I) + row[None, :] * I + i[:, None]
    s_ptrs = s_ptr + expert * (blocks_d * blocks_i) + (row // BLOCK)[None, :] * blocks_i
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for at in tl.range(0, I, BLOCK_I, num_stages=STAGES):
        scale = tl.load(s_ptrs + at // BLOCK)
        if I % BLOCK_I == 0:
            h = tl.load(h_ptrs + at)
            q = tl.load(q_ptrs + at)
        else:
            h = tl.load(h_ptrs + at, mask=at + i[None, :] < I, other=0.0)
            q = tl.load(q_ptrs + at, mask=at + i[:, None] < I, other=0.0)
        acc += dot(h, (q.to(tl.float32) * scale).to(h.dtype))
    pair = tl.load(sorted_ptr + first + m, mask=m < count, other=0).to(tl.int64)
    y_ptrs = y_ptr + pair[:, None] * D + d[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(m < count)[:, None] & (d < D)[None, :])


def grouped_outputs(
    x_TD: Tensor,
    ids_Tk: Tensor,
    q_gate_up_E2ID: Tensor,
    s_gate_up: Tensor,
    q_down_EDI: Tensor,
    s_down: Tensor,
    num_shared: int,
) -> Tensor:
    """Every pair's output [T * k, D] in x's dtype, not yet weighted. x's rows may have any stride."""
    (T, k), (E, D, I), device = ids_Tk.shape, q_down_EDI.shape, x_TD.device
    rows = rows_per_block(T * k, E)
    sorted_P, blocks_N3 = sort_pairs(ids_Tk, E, num_shared, rows)
    h_PI = torch.empty(T * k, I, dtype=x_TD.dtype, device=device)
    y_PD = torch.empty(T * k, D, dtype=x_TD.dtype, device=device)
    # float32 has no tensor cores: small tiles, for registers.
    half = x_TD.dtype != torch.float32
    block_i, block_d, depth, stages = (128, 256, 64, 3) if half else (16, 16, 16, 1)
    gate_up_grouped_kernel[(len(blocks_N3) * triton.cdiv(I, block_i),)](
        x_TD,
        sorted_P,
        blocks_N3,
        q_gate_up_E2ID,
        s_gate_up,
        h_PI,
        x_TD.stride(0),
        D=D,
        I=I,
        K=k,
        ROWS=rows,
        BLOCK_I=block_i,
        BLOCK_D=depth,
        STAGES=stages,
        num_warps=8,
    )
    down_grouped_kernel[(len(blocks_N3) * triton.cdiv(D, block_d),)](
        h_PI,
        sorted_P,
        blocks_N3,
        q_down_EDI,
        s_down,
        y_PD,
        D=D,
        I=I,
        ROWS=rows,
        BLOCK_D=block_d,
        BLOCK_I=depth,
        STAGES=stages,
        num_warps=8,
    )
    return y_PD
