"""Experts for the many tokens of a prefill: a sort of the (token, expert) pairs by expert, two grouped matrix products,
and the weighted sum. Five launches and a fill (with fp8 one more, that brings x to fp16); nothing waits for the device.

The order within an expert changes from run to run. Nothing else does: a pair's products do not depend on its
neighbours, and the sum has one fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.ops.moe.experts.triton.grouping import Groups, sort_pairs
from thalweg.ops.moe.experts.triton.half import in_half
from thalweg.ops.moe.experts.triton.products import BLOCK, down_sums, gate_up_sums, silu_and_mul
from thalweg.ops.moe.experts.triton.weighted_sum import weighted_sum

SLICE = 16384  # tokens at a time: what is kept in between is at most this many rows for each expert of a token


@triton.jit
def _gate_up_tile(
    x_ptr,
    x_scale_ptr,
    x_stride,
    sorted_ptr,
    w_ptr,
    s_ptr,
    h_ptr,
    first,
    count,
    i,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h of `count` sorted pairs from `first` on, the columns i of it, from one expert's weights."""
    m = tl.arange(0, ROWS)
    token = tl.load(sorted_ptr + first + m, mask=m < count, other=0).to(tl.int64) // K
    x_ptrs = x_ptr + token[:, None] * x_stride
    w_ptrs = w_ptr + tl.minimum(i, I - 1)[None, :] * D
    gate, up = gate_up_sums(x_ptrs, w_ptrs, s_ptr, D, I, BLOCK_D, STAGES, True)
    if x_scale_ptr is not None:
        scale = tl.load(x_scale_ptr + token)[:, None]
        gate *= scale
        up *= scale
    h_ptrs = h_ptr + (first + m).to(tl.int64)[:, None] * I + i[None, :]
    h = silu_and_mul(gate, up).to(h_ptr.dtype.element_ty)
    tl.store(h_ptrs, h, mask=(m < count)[:, None] & (i < I)[None, :])


@triton.jit
def gate_up_grouped_kernel(
    x_ptr,
    x_scale_ptr,  # of x's rows if they are scaled fp16, or None
    sorted_ptr,
    blocks_ptr,
    w_ptr,  # [E, 2I, D]
    s_ptr,  # [E, 2 * blocks of I, blocks of D], or None
    h_ptr,  # [T * K, I], by expert
    x_stride,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,  # a tile of as many rows where they are enough
    BLOCK_I: tl.constexpr,  # divides BLOCK if there are scales
    BLOCK_D: tl.constexpr,  # divides BLOCK if there are scales
    STAGES: tl.constexpr,
):
    tiles: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    block = tl.program_id(0) // tiles
    count = tl.load(blocks_ptr + 3 * block + 2)
    if count == 0:
        return
    expert = tl.load(blocks_ptr + 3 * block).to(tl.int64)
    first = tl.load(blocks_ptr + 3 * block + 1)
    start = (tl.program_id(0) % tiles) * BLOCK_I
    i = start + tl.arange(0, BLOCK_I)
    w_ptr += expert * (2 * I * D)
    if s_ptr is not None:
        blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
        s_ptr += (expert * (2 * blocks_i) + start // BLOCK) * ((D + BLOCK - 1) // BLOCK)
    operands = (x_ptr, x_scale_ptr, x_stride, sorted_ptr, w_ptr, s_ptr, h_ptr)
    if count <= TAIL:
        _gate_up_tile(*operands, first, count, i, D, I, K, TAIL, BLOCK_D, STAGES)
    else:
        _gate_up_tile(*operands, first, count, i, D, I, K, ROWS, BLOCK_D, STAGES)


@triton.jit
def _down_tile(
    h_ptr,
    sorted_ptr,
    w_ptr,
    s_ptr,
    y_ptr,
    first,
    count,
    d,
    D: tl.constexpr,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y of `count` sorted pairs from `first` on, the columns d of it, from one expert's weights."""
    m = tl.arange(0, ROWS)
    h_ptrs = h_ptr + (first + tl.minimum(m, count - 1)).to(tl.int64)[:, None] * I
    w_ptrs = w_ptr + tl.minimum(d, D - 1)[None, :] * I
    y = down_sums(h_ptrs, w_ptrs, s_ptr, 0, I, BLOCK_I, STAGES, True)
    pair = tl.load(sorted_ptr + first + m, mask=m < count, other=0).to(tl.int64)
    y_ptrs = y_ptr + pair[:, None] * D + d[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(m < count)[:, None] & (d < D)[None, :])


@triton.jit
def down_grouped_kernel(
    h_ptr,
    sorted_ptr,
    blocks_ptr,
    w_ptr,  # [E, D, I]
    s_ptr,  # [E, blocks of D, blocks of I], or None
    y_ptr,  # [T * K, D], by token
    D: tl.constexpr,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,  # divides BLOCK if there are scales
    BLOCK_I: tl.constexpr,  # divides BLOCK if there are scales
    STAGES: tl.constexpr,
):
    tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    block = tl.program_id(0) // tiles
    count = tl.load(blocks_ptr + 3 * block + 2)
    if count == 0:
        return
    expert = tl.load(blocks_ptr + 3 * block).to(tl.int64)
    first = tl.load(blocks_ptr + 3 * block + 1)
    start = (tl.program_id(0) % tiles) * BLOCK_D
    d = start + tl.arange(0, BLOCK_D)
    w_ptr += expert * (D * I)
    if s_ptr is not None:
        s_ptr += (expert * ((D + BLOCK - 1) // BLOCK) + start // BLOCK) * ((I + BLOCK - 1) // BLOCK)
    if count <= TAIL:
        _down_tile(h_ptr, sorted_ptr, w_ptr, s_ptr, y_ptr, first, count, d, D, I, TAIL, BLOCK_I, STAGES)
    else:
        _down_tile(h_ptr, sorted_ptr, w_ptr, s_ptr, y_ptr, first, count, d, D, I, ROWS, BLOCK_I, STAGES)


class Tile(NamedTuple):
    """How a product is cut: columns of it and of its operands at a time, stages of the pipeline, warps, and the rows of
    a smaller tile."""

    columns: int
    depth: int
    stages: int
    warps: int
    tail: int


# By whether weights have scales and by the rows of a block.
GATE_UP_TILES = {
    (False, 64): Tile(128, 64, 4, 4, 32),
    (False, 128): Tile(128, 64, 4, 8, 64),
    (True, 64): Tile(128, 64, 3, 4, 32),
    (True, 128): Tile(64, 64, 4, 8, 64),
}
DOWN_TILES = {
    (False, 64): Tile(256, 64, 4, 4, 32),
    (False, 128): Tile(256, 64, 4, 8, 64),
    (True, 64): Tile(128, 64, 4, 4, 32),
    (True, 128): Tile(128, 64, 4, 8, 64),
}
# In float32 there are no tensor cores: a small tile, for registers.
FP32_GATE_UP_TILES = {False: Tile(128, 16, 1, 8, 16), True: Tile(16, 16, 1, 8, 16)}
FP32_DOWN_TILES = {False: Tile(256, 16, 1, 8, 16), True: Tile(16, 16, 1, 8, 16)}


def experts_of_groups(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,
) -> Tensor:
    """A pair's output is rounded to x's dtype before the sum."""
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    block = min(1024, triton.next_power_of_2(x_TD.shape[1]))
    for start in range(0, len(x_TD), SLICE):
        x, weights, ids, out = (t[start : start + SLICE] for t in (x_TD, weights_Tk, ids_Tk, out_TD))
        residual = None if residual_TD is None else residual_TD[start : start + SLICE]
        groups = sort_pairs(ids, len(down[0]), num_shared)
        h_PI = run_gate_up(x, groups, ids.shape[1], *gate_up)
        weighted_sum(run_down(h_PI, groups, *down), weights, out, residual, block, warps=4)
    return out_TD


def run_gate_up(x_TD: Tensor, groups: Groups, top_k: int, w_E2ID: Tensor, scales: Tensor | None = None) -> Tensor:
    """h [T * k, I] = silu(gate x) * up x of every pair, by expert, in x's dtype."""
    (T, D), I, scaled = x_TD.shape, w_E2ID.shape[1] // 2, scales is not None
    h_PI = torch.empty(T * top_k, I, dtype=x_TD.dtype, device=x_TD.device)
    fp32, x_scale_T = x_TD.dtype == torch.float32, None
    tile = FP32_GATE_UP_TILES[scaled] if fp32 else GATE_UP_TILES[scaled, groups.rows]
    if scaled and not fp32:
        x_TD, x_scale_T = in_half(x_TD)
    gate_up_grouped_kernel[(len(groups.blocks_N3) * triton.cdiv(I, tile.columns),)](
        x_TD,
        x_scale_T,
        groups.sorted_P,
        groups.blocks_N3,
        w_E2ID,
        scales,
        h_PI,
        x_TD.stride(0),
        D=D,
        I=I,
        K=top_k,
        ROWS=groups.rows,
        TAIL=tile.tail,
        BLOCK_I=tile.columns,
        BLOCK_D=tile.depth,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return h_PI


def run_down(h_PI: Tensor, groups: Groups, w_EDI: Tensor, scales: Tensor | None = None) -> Tensor:
    """y [T * k, D] = down h of every pair, by token, in h's dtype."""
    (_, D, I), scaled = w_EDI.shape, scales is not None
    y_PD = torch.empty(len(h_PI), D, dtype=h_PI.dtype, device=h_PI.device)
    tile = FP32_DOWN_TILES[scaled] if h_PI.dtype == torch.float32 else DOWN_TILES[scaled, groups.rows]
    down_grouped_kernel[(len(groups.blocks_N3) * triton.cdiv(D, tile.columns),)](
        h_PI,
        groups.sorted_P,
        groups.blocks_N3,
        w_EDI,
        scales,
        y_PD,
        D=D,
        I=I,
        ROWS=groups.rows,
        TAIL=tile.tail,
        BLOCK_D=tile.columns,
        BLOCK_I=tile.depth,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return y_PD
