"""Experts in fp8 for a few tokens: one program takes a few rows of one (token, expert) pair.

A weight goes from e4m3 to fp32 in registers. Its scale is applied once to the products of a block of 128 columns, of
which a program's rows have one each, not to every element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.moe.triton.experts import _load_row_tiles
from thalweg.ops.toolchain.triton_launch import pdl_options
from thalweg.quant.fp8 import BLOCK as _BLOCK

BLOCK = tl.constexpr(_BLOCK)


@triton.jit
def _load_scales(s_ptr, count: tl.constexpr):
    scales = ()
    for c in tl.static_range(count):
        scales = scales + (tl.load(s_ptr + c),)
    return scales


@triton.jit
def _products(w, x):
    """Sums of w * x over runs of 16 columns, which few threads hold: [rows, BLOCK] to [rows, BLOCK / 16]."""
    return tl.sum(tl.reshape(w.to(tl.float32) * x, [w.shape[0], BLOCK // 16, 16]), 2)


@triton.jit
def gate_up_pair_kernel(
    x_ptr,
    ids_ptr,
    q_ptr,  # [E, 2I, D] e4m3
    s_ptr,  # [E, 2 * blocks of I, blocks of D]
    h_ptr,  # [T * K, I]
    pairs,
    x_stride,
    E: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_I: tl.constexpr,  # divides BLOCK, so that a program's rows lie in one row of blocks
    PDL: tl.constexpr,
):
    blocks: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    blocks_d: tl.constexpr = (D + BLOCK - 1) // BLOCK
    blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
    # Backwards, so that the shared experts come first: their weights are known before the router is done.
    pair = pairs - 1 - tl.program_id(0) // blocks
    expert = E - K + pair % K
    if pair % K < K - SHARED:
        if PDL:
            gdc_wait()
        expert = tl.load(ids_ptr + pair).to(tl.int32)
    first = (tl.program_id(0) % blocks) * BLOCK_I
    rows = first + tl.arange(0, BLOCK_I)
    cols = tl.arange(0, BLOCK)
    gate_ptrs = q_ptr + (expert.to(tl.int64) * (2 * I) + tl.minimum(rows, I - 1))[:, None] * D + cols[None, :]
    gate_tiles = _load_row_tiles(gate_ptrs, cols, D, BLOCK)
    up_tiles = _load_row_tiles(gate_ptrs + I * D, cols, D, BLOCK)
    s_ptr += (expert * 2 * blocks_i + first // BLOCK) * blocks_d
    gate_scales = _load_scales(s_ptr, blocks_d)
    up_scales = _load_scales(s_ptr + blocks_i * blocks_d, blocks_d)
    if PDL:
        # Only now may "down" start: it reads ids before its own wait, and they are complete here.
        gdc_wait()
        gdc_launch_dependents()
    x_tiles = _load_row_tiles(x_ptr + (pair // K) * x_stride + (rows * 0)[:, None] + cols[None, :], cols, D, BLOCK)
    gate = tl.zeros([BLOCK_I, BLOCK // 16], tl.float32)
    up = tl.zeros([BLOCK_I, BLOCK // 16], tl.float32)
    for c in tl.static_range(blocks_d):
        x = x_tiles[c].to(tl.float32)
        gate += _products(gate_tiles[c], x) * gate_scales[c]
        up += _products(up_tiles[c], x) * up_scales[c]
    gate_sum = tl.sum(gate, 1)
    h = gate_sum / (1.0 + tl.exp(-gate_sum)) * tl.sum(up, 1)
    tl.store(h_ptr + pair * I + rows, h.to(h_ptr.dtype.element_ty), mask=rows < I)


@triton.jit
def down_pair_kernel(
    h_ptr,
    ids_ptr,
    q_ptr,  # [E, D, I] e4m3
    s_ptr,  # [E, blocks of D, blocks of I]
    y_ptr,  # [T * K, D] fp32
    D: tl.constexpr,
    I: tl.constexpr,
    BLOCK_D: tl.constexpr,  # divides BLOCK
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    blocks_d: tl.constexpr = (D + BLOCK - 1) // BLOCK
    blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
    pair = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK_D
    rows = first + tl.arange(0, BLOCK_D)
    cols = tl.arange(0, BLOCK)
    # The ids are complete: "gate_up" lets this kernel start only after its own wait for them. Not from L1, which may
    # hold what was there before.
    expert = tl.load(ids_ptr + pair, cache_modifier=".cg").to(tl.int64)
    q_ptrs = q_ptr + (expert * D + tl.minimum(rows, D - 1))[:, None] * I + cols[None, :]
    tiles = _load_row_tiles(q_ptrs, cols, I, BLOCK)
    scales = _load_scales(s_ptr + (expert * blocks_d + first // BLOCK) * blocks_i, blocks_i)
    if PDL:
        gdc_wait()
    h_tiles = _load_row_tiles(h_ptr + pair * I + (rows * 0)[:, None] + cols[None, :], cols, I, BLOCK)
    acc = tl.zeros([BLOCK_D, BLOCK // 16], tl.float32)
    for c in tl.static_range(blocks_i):
        acc += _products(tiles[c], h_tiles[c].to(tl.float32)) * scales[c]
    tl.store(y_ptr + pair * D + rows, tl.sum(acc, 1), mask=rows < D)


def run_gate_up_pairs(
    x_TD: Tensor, ids_Tk: Tensor, q_E2ID: Tensor, s_gate_up: Tensor, num_shared: int, block: int = 8, warps: int = 4
) -> Tensor:
    """h [T * k, I] = silu(gate x) * up x of every pair, in x's dtype."""
    (E, I2, D), (T, K) = q_E2ID.shape, ids_Tk.shape
    I = I2 // 2
    h_PI = torch.empty(T * K, I, dtype=x_TD.dtype, device=x_TD.device)
    gate_up_pair_kernel[(T * K * triton.cdiv(I, block),)](
        x_TD,
        ids_Tk,
        q_E2ID,
        s_gate_up,
        h_PI,
        T * K,
        x_TD.stride(0),
        E=E,
        D=D,
        I=I,
        K=K,
        SHARED=num_shared,
        BLOCK_I=block,
        num_warps=warps,
        **pdl_options(x_TD),
    )
    return h_PI


def run_down_pairs(
    h_PI: Tensor, ids_Tk: Tensor, q_EDI: Tensor, s_down: Tensor, block: int = 16, warps: int = 2
) -> Tensor:
    """y [T * k, D] fp32 = down h of every pair."""
    _, D, I = q_EDI.shape
    P = ids_Tk.numel()
    y_PD = torch.empty(P, D, dtype=torch.float32, device=h_PI.device)
    down_pair_kernel[(P * triton.cdiv(D, block),)](
        h_PI, ids_Tk, q_EDI, s_down, y_PD, D=D, I=I, BLOCK_D=block, num_warps=warps, **pdl_options(h_PI)
    )
    return y_PD
