"""Experts in fp8 for the many tokens of a prefill: ops/moe/triton/grouped.py with weights widened tile by tile.

A weight takes its scale as it is widened, so that sums run through all columns in one accumulator. What it takes is the
scale over the largest one of its rows, and the sums take that: so nothing leaves the range of the tiles' type, and what
falls below it is 2^-32 of the largest weight of these blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from thalweg.ops.moe.triton.grouped import SLICE, rows_per_block, sort_pairs, weighted_sum_kernel
from thalweg.ops.moe_fp8.triton.tiles import store_half_row
from thalweg.ops.toolchain.triton_dot import INTERPRETED, dot
from thalweg.quant.fp8 import BLOCK as _BLOCK

BLOCK = tl.constexpr(_BLOCK)
LARGEST_SCALE = tl.constexpr(2.0**126)  # of which the inverse is a normal number

# Four weights at a time. To fp16 there is an instruction for two.
_TO_FP16 = tl.constexpr("""{
.reg .b16 low, high;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
mul.rn.f16x2 $0, $0, $3;
mul.rn.f16x2 $1, $1, $4;
}""")
# To bf16: sign, exponent and fraction moved to their places make 2^-120 of a weight, subnormal ones included.
_TO_BF16 = tl.constexpr("""{
.reg .b32 a, b;
prmt.b32 $0, $2, 0, 0x1404;
prmt.b32 $1, $2, 0, 0x3424;
shr.u32 a, $0, 4;
shr.u32 b, $1, 4;
and.b32 a, a, 0x07f007f0;
and.b32 b, b, 0x07f007f0;
lop3.b32 $0, $0, 0x80008000, a, 0xea;
lop3.b32 $1, $1, 0x80008000, b, 0xea;
mul.rn.bf16x2 $0, $0, $3;
mul.rn.bf16x2 $1, $1, $4;
}""")


@triton.jit
def _widen(q, factor, dtype: tl.constexpr):
    """q * factor in `dtype`; factor is a power of two up to 1, of a shape that broadcasts."""
    if INTERPRETED or dtype == tl.float32:
        return (q.to(tl.float32) * factor).to(dtype)
    elif dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _TO_FP16, "=&r,=&r,r,r,r", [q, factor.to(tl.float16)], tl.float16, is_pure=True, pack=4
        )
    else:
        factor *= 2.0**120
        return tl.inline_asm_elementwise(
            _TO_BF16, "=&r,=&r,r,r,r", [q, factor.to(tl.bfloat16)], tl.bfloat16, is_pure=True, pack=4
        )


@triton.jit
def _inverse(scale):
    """Of a power of two, exactly."""
    return ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _largest(s_ptrs, blocks: tl.constexpr):
    """Of a row's scales."""
    largest = tl.load(s_ptrs)
    for c in tl.range(1, blocks):
        largest = tl.maximum(largest, tl.load(s_ptrs + c))
    return tl.minimum(largest, LARGEST_SCALE)


@triton.jit
def half_kernel(x_ptr, half_ptr, scale_ptr, x_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    store_half_row(x_ptr, half_ptr, scale_ptr, tl.program_id(0).to(tl.int64), x_stride, D, BLOCK_D)


@triton.jit
def _gate_up_tile(
    x_ptr,
    scale_ptr,
    sorted_ptr,
    q_ptr,
    s_ptr,
    h_ptr,
    first,
    count,
    i,
    x_stride,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h of `count` sorted pairs from `first` on, the columns i of it, from one expert's weights."""
    blocks_d: tl.constexpr = (D + BLOCK - 1) // BLOCK
    blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
    m = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    token = tl.load(sorted_ptr + first + m, mask=m < count, other=0).to(tl.int64) // K
    x_ptrs = x_ptr + token[:, None] * x_stride + d[None, :]
    q_ptrs = q_ptr + tl.minimum(i, I - 1)[None, :] * D + d[:, None]
    s_up_ptr = s_ptr + blocks_i * blocks_d
    largest_gate = _largest(s_ptr, blocks_d)
    largest_up = _largest(s_up_ptr, blocks_d)
    gate_factor = _inverse(largest_gate)
    up_factor = _inverse(largest_up)
    gate = tl.zeros([ROWS, i.shape[0]], tl.float32)
    up = tl.zeros([ROWS, i.shape[0]], tl.float32)
    for at in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        gate_scale = tl.load(s_ptr + at // BLOCK) * gate_factor
        up_scale = tl.load(s_up_ptr + at // BLOCK) * up_factor
        if D % BLOCK_D == 0:
            x = tl.load(x_ptrs + at)
            q_gate = tl.load(q_ptrs + at)
            q_up = tl.load(q_ptrs + at + I * D)
        else:
            x = tl.load(x_ptrs + at, mask=at + d[None, :] < D, other=0.0)
            q_gate = tl.load(q_ptrs + at, mask=at + d[:, None] < D, other=0.0)
            q_up = tl.load(q_ptrs + at + I * D, mask=at + d[:, None] < D, other=0.0)
        gate += dot(x, _widen(q_gate, gate_scale, x.dtype))
        up += dot(x, _widen(q_up, up_scale, x.dtype))
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + token)[:, None]
        gate *= scale
        up *= scale
    gate *= largest_gate
    up *= largest_up
    h = gate * tl.sigmoid(gate) * up
    h_ptrs = h_ptr + (first + m).to(tl.int64)[:, None] * I + i[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=(m < count)[:, None] & (i < I)[None, :])


@triton.jit
def gate_up_grouped_kernel(
    x_ptr,  # fp16 and scaled, or as it is
    scale_ptr,  # of x's rows, or None
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
    TAIL: tl.constexpr,  # a tile of as many rows where they are enough
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
    start = (tl.program_id(0) % tiles) * BLOCK_I
    i = start + tl.arange(0, BLOCK_I)
    q_ptr += expert * (2 * I * D)
    s_ptr += (expert * (2 * blocks_i) + start // BLOCK) * blocks_d
    if count <= TAIL:
        _gate_up_tile(
            x_ptr, scale_ptr, sorted_ptr, q_ptr, s_ptr, h_ptr, first, count, i, x_stride, D, I, K, TAIL, BLOCK_D, STAGES
        )
    else:
        _gate_up_tile(
            x_ptr, scale_ptr, sorted_ptr, q_ptr, s_ptr, h_ptr, first, count, i, x_stride, D, I, K, ROWS, BLOCK_D, STAGES
        )


@triton.jit
def _down_tile(
    h_ptr,
    sorted_ptr,
    q_ptr,
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
    blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
    m = tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK_I)
    row = tl.minimum(d, D - 1)
    h_ptrs = h_ptr + (first + tl.minimum(m, count - 1)).to(tl.int64)[:, None] * I + i[None, :]
    q_ptrs = q_ptr + row[None, :] * I + i[:, None]
    s_ptrs = s_ptr + (row // BLOCK)[None, :] * blocks_i
    largest = _largest(s_ptrs, blocks_i)
    factor = _inverse(largest)
    acc = tl.zeros([ROWS, d.shape[0]], tl.float32)
    for at in tl.range(0, I, BLOCK_I, num_stages=STAGES):
        scale = tl.load(s_ptrs + at // BLOCK) * factor
        if I % BLOCK_I == 0:
            h = tl.load(h_ptrs + at)
            q = tl.load(q_ptrs + at)
        else:
            h = tl.load(h_ptrs + at, mask=at + i[None, :] < I, other=0.0)
            q = tl.load(q_ptrs + at, mask=at + i[:, None] < I, other=0.0)
        acc += dot(h, _widen(q, scale, h.dtype))
    acc *= largest
    pair = tl.load(sorted_ptr + first + m, mask=m < count, other=0).to(tl.int64)
    y_ptrs = y_ptr + pair[:, None] * D + d[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(m < count)[:, None] & (d < D)[None, :])


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
    TAIL: tl.constexpr,
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
    d = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    q_ptr += expert * (D * I)
    s_ptr += expert * (blocks_d * blocks_i)
    if count <= TAIL:
        _down_tile(h_ptr, sorted_ptr, q_ptr, s_ptr, y_ptr, first, count, d, D, I, TAIL, BLOCK_I, STAGES)
    else:
        _down_tile(h_ptr, sorted_ptr, q_ptr, s_ptr, y_ptr, first, count, d, D, I, ROWS, BLOCK_I, STAGES)


class Groups(NamedTuple):
    """What sort_pairs gives, and the rows of a block."""

    sorted_P: Tensor
    blocks_N3: Tensor
    rows: int


class Tile(NamedTuple):
    """How a product is cut: columns of it and of its operands at a time, and so on."""

    columns: int
    depth: int
    stages: int
    warps: int
    tail: int


# By the rows of a block.
GATE_UP_TILES = {64: Tile(128, 64, 3, 4, 32), 128: Tile(64, 64, 4, 8, 64)}
DOWN_TILES = {64: Tile(128, 64, 4, 4, 32), 128: Tile(128, 64, 4, 8, 64)}
FP32_TILE = Tile(16, 16, 1, 8, 16)  # no tensor cores: a small tile, for registers


def run_half(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(x in fp16, each row times a power of two; the inverse of that, fp32 [T])."""
    T, D = x_TD.shape
    half_TD = torch.empty(T, D, dtype=torch.float16, device=x_TD.device)
    scale_T = torch.empty(T, device=x_TD.device)
    half_kernel[(T,)](x_TD, half_TD, scale_T, x_TD.stride(0), D=D, BLOCK_D=triton.next_power_of_2(D), num_warps=4)
    return half_TD, scale_T


def run_gate_up(
    x_TD: Tensor,
    groups: Groups,
    top_k: int,
    q_E2ID: Tensor,
    s_gate_up: Tensor,
) -> Tensor:
    """h [T * k, I] = silu(gate x) * up x of every pair, by expert, in x's dtype."""
    (T, D), I = x_TD.shape, q_E2ID.shape[1] // 2
    h_PI = torch.empty(T * top_k, I, dtype=x_TD.dtype, device=x_TD.device)
    tile, scale_T = FP32_TILE, None
    if x_TD.dtype != torch.float32:
        tile = GATE_UP_TILES[groups.rows]
        x_TD, scale_T = run_half(x_TD)
    gate_up_grouped_kernel[(len(groups.blocks_N3) * triton.cdiv(I, tile.columns),)](
        x_TD,
        scale_T,
        groups.sorted_P,
        groups.blocks_N3,
        q_E2ID,
        s_gate_up,
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


def run_down(h_PI: Tensor, groups: Groups, q_EDI: Tensor, s_down: Tensor) -> Tensor:
    """y [T * k, D] = down h of every pair, by token, in h's dtype."""
    _, D, I = q_EDI.shape
    y_PD = torch.empty(len(h_PI), D, dtype=h_PI.dtype, device=h_PI.device)
    tile = FP32_TILE if h_PI.dtype == torch.float32 else DOWN_TILES[groups.rows]
    down_grouped_kernel[(len(groups.blocks_N3) * triton.cdiv(D, tile.columns),)](
        h_PI,
        groups.sorted_P,
        groups.blocks_N3,
        q_EDI,
        s_down,
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


def experts_grouped(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    q_gate_up_E2ID: Tensor,
    s_gate_up: Tensor,
    q_down_EDI: Tensor,
    s_down: Tensor,
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,
) -> Tensor:
    """Op "experts_fp8" for any T. A pair's output is rounded to x's dtype before the sum."""
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    (_, D), K = x_TD.shape, ids_Tk.shape[1]
    block = min(1024, triton.next_power_of_2(D))
    for start in range(0, x_TD.shape[0], SLICE):
        x, weights, ids, y = (t[start : start + SLICE] for t in (x_TD, weights_Tk, ids_Tk, y_TD))
        rows = rows_per_block(ids.numel(), len(q_down_EDI))
        groups = Groups(*sort_pairs(ids, len(q_down_EDI), num_shared, rows), rows)
        h_PI = run_gate_up(x, groups, K, q_gate_up_E2ID, s_gate_up)
        y_PD = run_down(h_PI, groups, q_down_EDI, s_down)
        weighted_sum_kernel[(len(x), triton.cdiv(D, block))](y_PD, weights, y, D, K, block, num_warps=4)
    return y_TD if residual_TD is None else residual_TD + y_TD
