"""Experts for the many tokens of a prefill: a sort of the (token, expert) pairs by expert, two grouped matrix products,
and the weighted sum. Five launches and a fill (with fp8 or int4 one more, that brings x to fp16 or its columns in
order); nothing waits for the device.

The order within an expert changes from run to run. Nothing else does: a pair's products do not depend on its
neighbours, and the sum has one fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from thalweg.ops.activation.triton import silu_and_mul
from thalweg.ops.moe.experts import Finish
from thalweg.ops.moe.experts.sort import Groups
from thalweg.ops.moe.experts.triton.grouping import rows_per_block, sort_pairs
from thalweg.ops.moe.experts.triton.half import in_half
from thalweg.ops.moe.experts.triton.nibbles import in_order, ordered_width
from thalweg.ops.moe.experts.triton.products import down_sums, gate_up_sums, h_width, scheme_of, store_h
from thalweg.ops.moe.experts.triton.weighted_sum import MAX_NORMED, weighted_sum, weighted_sum_norm
from thalweg.ops.norm import NextNorm

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
    expert,
    first,
    count,
    start,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h of `count` sorted pairs from `first` on, the places from `start` on of it, from one expert's weights."""
    m = tl.arange(0, ROWS)
    token = tl.load(sorted_ptr + first + m, mask=m < count, other=0).to(tl.int64) // K
    x_ptrs = x_ptr + token[:, None] * x_stride
    gate, up = gate_up_sums(x_ptrs, w_ptr, s_ptr, expert, start, D, I, BLOCK_I, BLOCK_D, STAGES, True)
    if x_scale_ptr is not None:
        scale = tl.load(x_scale_ptr + token)[:, None]
        gate *= scale
        up *= scale
    store_h(h_ptr, gate, up, (first + m).to(tl.int64), m < count, start, w_ptr, I)


@triton.jit
def gate_up_grouped_kernel(
    x_ptr,
    x_scale_ptr,  # of x's rows if they are scaled fp16, or None
    sorted_ptr,
    blocks_ptr,
    w_ptr,
    s_ptr,
    h_ptr,  # [T * K, h_width], by expert
    x_stride,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,  # a tile of as many rows where they are enough
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles: tl.constexpr = (h_width(w_ptr.dtype.element_ty, I) + BLOCK_I - 1) // BLOCK_I
    block = tl.program_id(0) // tiles
    count = tl.load(blocks_ptr + 3 * block + 2)
    if count == 0:
        return
    expert = tl.load(blocks_ptr + 3 * block)
    first = tl.load(blocks_ptr + 3 * block + 1)
    start = (tl.program_id(0) % tiles) * BLOCK_I
    operands = (x_ptr, x_scale_ptr, x_stride, sorted_ptr, w_ptr, s_ptr, h_ptr, expert, first, count, start)
    if count <= TAIL:
        _gate_up_tile(*operands, D, I, K, TAIL, BLOCK_I, BLOCK_D, STAGES)
    else:
        _gate_up_tile(*operands, D, I, K, ROWS, BLOCK_I, BLOCK_D, STAGES)


@triton.jit
def _down_tile(
    h_ptr,
    sorted_ptr,
    w_ptr,
    s_ptr,
    y_ptr,
    expert,
    first,
    count,
    start,
    D: tl.constexpr,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y of `count` sorted pairs from `first` on, the columns from `start` on of it, from one expert's weights."""
    m = tl.arange(0, ROWS)
    # Rows past the count are read all the same, but within the pairs, and not stored.
    h_ptrs = h_ptr + (first + tl.minimum(m, count - 1)).to(tl.int64)[:, None] * h_width(w_ptr.dtype.element_ty, I)
    y = down_sums(h_ptrs, w_ptr, s_ptr, expert, start, D, I, BLOCK_D, BLOCK_I, STAGES, True)
    pair = tl.load(sorted_ptr + first + m, mask=m < count, other=0).to(tl.int64)
    d = start + tl.arange(0, BLOCK_D)
    y_ptrs = y_ptr + pair[:, None] * D + d[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(m < count)[:, None] & (d < D)[None, :])


@triton.jit
def down_grouped_kernel(
    h_ptr,
    sorted_ptr,
    blocks_ptr,
    w_ptr,
    s_ptr,
    y_ptr,  # [T * K, D], by token
    D: tl.constexpr,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    block = tl.program_id(0) // tiles
    count = tl.load(blocks_ptr + 3 * block + 2)
    if count == 0:
        return
    expert = tl.load(blocks_ptr + 3 * block)
    first = tl.load(blocks_ptr + 3 * block + 1)
    start = (tl.program_id(0) % tiles) * BLOCK_D
    operands = (h_ptr, sorted_ptr, w_ptr, s_ptr, y_ptr, expert, first, count, start)
    if count <= TAIL:
        _down_tile(*operands, D, I, TAIL, BLOCK_D, BLOCK_I, STAGES)
    else:
        _down_tile(*operands, D, I, ROWS, BLOCK_D, BLOCK_I, STAGES)


class Tile(NamedTuple):
    """How a product is cut: columns of it and of its operands at a time, stages of the pipeline, warps, and the rows of
    a smaller tile."""

    columns: int
    depth: int
    stages: int
    warps: int
    tail: int


FEW = {"none": 96, "fp8": 96, "int4": 64}  # pairs per expert, for blocks of 64 rows
# By scheme and by the rows of a block.
GATE_UP_TILES = {
    ("none", 64): Tile(128, 64, 4, 4, 32),
    ("none", 128): Tile(128, 64, 4, 8, 64),
    ("fp8", 64): Tile(128, 64, 3, 4, 32),
    ("fp8", 128): Tile(64, 64, 4, 8, 64),
    ("int4", 64): Tile(64, 128, 3, 4, 32),
    ("int4", 128): Tile(128, 128, 3, 8, 64),
}
DOWN_TILES = {
    ("none", 64): Tile(256, 64, 4, 4, 32),
    ("none", 128): Tile(256, 64, 4, 8, 64),
    ("fp8", 64): Tile(128, 64, 4, 4, 32),
    ("fp8", 128): Tile(128, 64, 4, 8, 64),
    ("int4", 64): Tile(128, 128, 3, 8, 32),
    ("int4", 128): Tile(256, 128, 3, 8, 64),
}
# In float32 there are no tensor cores: a small tile, for registers.
FP32_GATE_UP_TILES = {"none": Tile(128, 16, 1, 8, 16), "fp8": Tile(16, 16, 1, 8, 16), "int4": Tile(16, 128, 1, 8, 16)}
FP32_DOWN_TILES = {"none": Tile(256, 16, 1, 8, 16), "fp8": Tile(16, 16, 1, 8, 16), "int4": Tile(16, 128, 1, 8, 16)}


def experts_of_groups(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,
    own: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    next_norm: NextNorm | None = None,
    finish: Finish | None = None,
) -> Tensor:
    def outputs(x: Tensor, ids: Tensor) -> Tensor:
        rows = rows_per_block(ids.numel(), len(down[0]), FEW[scheme_of(*down)])
        groups = sort_pairs(ids, len(down[0]), num_shared, rows)
        return run_down(run_gate_up(x, groups, ids.shape[1], *gate_up), groups, gate_up[0].shape[1] // 2, *down)

    return in_slices(outputs, x_TD, weights_Tk, ids_Tk, residual_TD, own, scale, next_norm, finish)


def in_slices(
    outputs: Callable[[Tensor, Tensor], Tensor],
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    residual_TD: Tensor | None,
    own: tuple[Tensor, Tensor] | None,
    scale: float,
    next_norm: NextNorm | None = None,
    finish: Finish | None = None,
) -> Tensor:
    """Of x and ids of some tokens, `outputs` gives those of their pairs, [T * k, D] by token, and they are summed up
    here, and normed if a row fits registers. A pair's output is rounded to x's dtype before the sum. The own expert's
    products are the library's."""

    def by_own(x: Tensor) -> Tensor | None:
        return None if own is None else F.linear(silu_and_mul(F.linear(x, own[0])), own[1])

    if finish is not None and 0 < len(x_TD) <= SLICE:
        return finish(outputs(x_TD, ids_Tk), weights_Tk=weights_Tk, own_TD=by_own(x_TD), scale=scale)
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    block = min(1024, triton.next_power_of_2(x_TD.shape[1]))
    if next_norm is not None and not next_norm.wants_float8 and x_TD.shape[1] <= MAX_NORMED:
        next_norm.normed_TD = torch.empty_like(out_TD)
    for start in range(0, len(x_TD), SLICE):
        x, weights, ids, out = (t[start : start + SLICE] for t in (x_TD, weights_Tk, ids_Tk, out_TD))
        residual = None if residual_TD is None else residual_TD[start : start + SLICE]
        y_PD = outputs(x, ids)
        own_TD = by_own(x)
        if next_norm is None or next_norm.normed_TD is None:
            weighted_sum(y_PD, weights, out, residual, own_TD, scale, block, warps=4)
        else:
            normed, norm = next_norm.normed_TD[start : start + SLICE], (next_norm.weight_D, next_norm.eps)
            weighted_sum_norm(y_PD, weights, out, normed, *norm, residual, own_TD, scale)
    return out_TD if finish is None else finish(out_TD)


def run_gate_up(
    x_TD: Tensor,
    groups: Groups,
    top_k: int,
    w_E2ID: Tensor,
    scales: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """h of every pair = silu(gate x) * up x, by expert, in x's dtype: [T * k, I], or with int4 [T * k, places of I]."""
    (T, D), I, scheme = x_TD.shape, w_E2ID.shape[1] // 2, scheme_of(w_E2ID, scales)
    fp32, x_scale_T = x_TD.dtype == torch.float32, None
    width = ordered_width(I) if scheme == "int4" else I
    h_PI = torch.empty(T * top_k, width, dtype=x_TD.dtype, device=x_TD.device)
    tile = tile or (FP32_GATE_UP_TILES[scheme] if fp32 else GATE_UP_TILES[scheme, groups.rows])
    if scheme == "int4":
        x_TD = in_order(x_TD)
    elif scheme == "fp8" and not fp32:
        x_TD, x_scale_T = in_half(x_TD)
    gate_up_grouped_kernel[(len(groups.blocks_N3) * triton.cdiv(width, tile.columns),)](
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


def run_down(
    h_PI: Tensor,
    groups: Groups,
    I: int,
    w_EDI: Tensor,
    scales: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """y [T * k, D] = down h of every pair, by token, in h's dtype."""
    D, scheme = w_EDI.shape[1], scheme_of(w_EDI, scales)
    y_PD = torch.empty(len(h_PI), D, dtype=h_PI.dtype, device=h_PI.device)
    tile = tile or (FP32_DOWN_TILES[scheme] if h_PI.dtype == torch.float32 else DOWN_TILES[scheme, groups.rows])
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
