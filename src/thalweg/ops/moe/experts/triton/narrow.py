"""Experts for a batch of tokens over weights in fp8, with activations in fp8 too: bound by streaming the weights once.

As `tiles`, a program takes a block of rows of one expert for all tokens that chose it, but nothing is widened: rows of
weights are the left operand of Hopper's matrix unit, straight from shared memory, and tokens its columns. A launch
ahead lists each expert's pairs and quantizes x, each row with a scale of its own; gate and up quantize h, each pair's
`rows` columns of a program with a scale of their own. Scales go to sums over 128 columns or fewer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.moe.experts import Finish
from thalweg.ops.moe.experts.triton.grouping import Lists, list_pairs
from thalweg.ops.moe.experts.triton.products import silu_and_mul
from thalweg.ops.moe.experts.triton.weighted_sum import MAX_NORMED, weighted_sum, weighted_sum_norm
from thalweg.ops.norm import NextNorm
from thalweg.ops.products.triton import LARGEST, SMALLEST
from thalweg.ops.toolchain.triton_dot import dot
from thalweg.ops.toolchain.triton_launch import pdl_options
from thalweg.quant.blocks import BLOCK as _BLOCK

BLOCK = tl.constexpr(_BLOCK)
TOKENS = tl.constexpr(16)  # of a tile
NARROW = 512  # columns of down, as in `tiles`
NORMED = 128  # tokens up to which projections take x in float8 (ops/linear/fp8)


class Tile(NamedTuple):
    """How a product is cut: rows of weights, stages of the pipeline, warps; tokens of a tile if more than TOKENS chose
    an expert."""

    rows: int
    stages: int
    warps: int
    wide: int = 32


@triton.jit
def store_quantized(h, h_ptr, h_scale_ptr, first, pair, here, I: tl.constexpr, BLOCK_I: tl.constexpr):
    """Rows first to first + BLOCK_I of h [BLOCK_I, tokens] fp32, in e4m3 with a scale for each token, to the places of
    its pair; where `here` is false, nowhere."""
    h_scale = tl.maximum(tl.max(tl.abs(h), 0), SMALLEST) * (1 / LARGEST)
    h = tl.trans(h * (1 / h_scale)[None, :]).to(h_ptr.dtype.element_ty)
    places = first + tl.arange(0, BLOCK_I)
    tl.store(h_ptr + pair[:, None] * I + places[None, :], h, mask=here[:, None])
    tl.store(h_scale_ptr + pair * (I // BLOCK_I) + first // BLOCK_I, h_scale, mask=here)


@triton.jit
def _gate_up(
    x_ptr,
    x_scale_ptr,
    w_ptrs,  # [BLOCK_I, 1], at gate's first column
    s_ptr,  # of gate's blocks
    h_ptr,
    h_scale_ptr,
    first,
    pair,  # [tokens]
    here,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    X_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    d = tl.arange(0, BLOCK)
    x_scale_ptrs = x_scale_ptr + pair // K * (D // BLOCK if X_BLOCKS else 1)
    x_ptrs = x_ptr + (pair // K)[None, :] * D + d[:, None]
    w_ptrs += d[None, :]
    s_up_ptr = s_ptr + I // BLOCK * (D // BLOCK)
    gate = tl.zeros([BLOCK_I, pair.shape[0]], tl.float32)
    up = tl.zeros([BLOCK_I, pair.shape[0]], tl.float32)
    for at in tl.range(0, D, BLOCK, num_stages=STAGES):
        gate_scale = tl.load(s_ptr + at // BLOCK)
        up_scale = tl.load(s_up_ptr + at // BLOCK)
        x = tl.load(x_ptrs + at)
        w_gate = tl.load(w_ptrs + at)
        w_up = tl.load(w_ptrs + I * D + at)
        if X_BLOCKS:
            x_scale = tl.load(x_scale_ptrs + at // BLOCK)[None, :]
            gate += dot(w_gate, x) * (gate_scale * x_scale)
            up += dot(w_up, x) * (up_scale * x_scale)
        else:
            gate += dot(w_gate, x) * gate_scale
            up += dot(w_up, x) * up_scale
    if not X_BLOCKS:
        scale = tl.load(x_scale_ptrs)[None, :]
        gate *= scale
        up *= scale
    store_quantized(silu_and_mul(gate, up), h_ptr, h_scale_ptr, first, pair, here, I, BLOCK_I)


@triton.jit
def narrow_gate_up_kernel(
    x_ptr,  # [T, D] e4m3
    x_scale_ptr,  # [T], or with X_BLOCKS [T, D / BLOCK]
    expert_ptr,  # these three: lists
    count_ptr,
    list_ptr,
    w_ptr,  # [E, 2I, D]
    s_ptr,  # [E, 2 blocks of I, blocks of D]
    h_ptr,  # [T * K, I] e4m3
    h_scale_ptr,  # [T * K, I / BLOCK_I]
    tokens,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    WIDE: tl.constexpr,
    X_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        # Only after the wait may "down" start: it reads lists before its own, and they are complete here.
        gdc_wait()
        gdc_launch_dependents()
    group, first = tl.program_id(0) // (I // BLOCK_I), tl.program_id(0) % (I // BLOCK_I) * BLOCK_I
    count = tl.load(count_ptr + group)
    expert = tl.load(expert_ptr + group).to(tl.int64)
    w_ptrs = w_ptr + expert * (2 * I * D) + (first + tl.arange(0, BLOCK_I))[:, None] * D
    s_ptr += (expert * (2 * I // BLOCK) + first // BLOCK) * (D // BLOCK)
    list_ptr += group * tokens
    out = (x_ptr, x_scale_ptr, w_ptrs, s_ptr, h_ptr, h_scale_ptr, first)
    if WIDE > TOKENS and count <= TOKENS:
        place = tl.arange(0, TOKENS)
        pair = tl.load(list_ptr + place, mask=place < count, other=0)
        if count > 0:
            _gate_up(*out, pair, place < count, D, I, K, BLOCK_I, X_BLOCKS, STAGES)
    else:
        start = 0
        while start < count:
            wide = start + tl.arange(0, WIDE)
            pairs = tl.load(list_ptr + wide, mask=wide < count, other=0)
            stages: tl.constexpr = STAGES if WIDE == TOKENS else STAGES - 1
            _gate_up(*out, pairs, wide < count, D, I, K, BLOCK_I, X_BLOCKS, stages)
            start += WIDE


@triton.jit
def down_sums(
    h_ptr,  # [T * K, I] e4m3
    h_scale_ptr,  # [T * K, I / GROUP]
    w_ptrs,  # [BLOCK_D, 1], at the first column
    s_ptr,  # of its blocks
    pair,  # [tokens]
    I: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,  # columns at a time
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """w h of these pairs, [BLOCK_D, tokens] fp32."""
    i = tl.arange(0, DEPTH)
    h_ptrs = h_ptr + pair[None, :] * I + i[:, None]
    h_scale_ptrs = h_scale_ptr + pair * (I // GROUP)
    w_ptrs += i[None, :]
    y = tl.zeros([BLOCK_D, pair.shape[0]], tl.float32)
    for at in tl.range(0, I, DEPTH, num_stages=STAGES):
        scale = tl.load(s_ptr + at // BLOCK) * tl.load(h_scale_ptrs + at // GROUP)
        h = tl.load(h_ptrs + at)
        w = tl.load(w_ptrs + at)
        y += dot(w, h) * scale[None, :]
    return y


@triton.jit
def _down(
    h_ptr,
    h_scale_ptr,
    w_ptrs,  # [BLOCK_D, 1]
    s_ptr,
    y_ptr,
    first,
    pair,
    here,
    D: tl.constexpr,
    I: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    y = down_sums(h_ptr, h_scale_ptr, w_ptrs, s_ptr, pair, I, GROUP, GROUP, BLOCK_D, STAGES)
    rows = first + tl.arange(0, BLOCK_D)
    tl.store(y_ptr + pair[:, None] * D + rows[None, :], tl.trans(y), mask=here[:, None])


@triton.jit
def narrow_down_kernel(
    h_ptr,  # [T * K, I] e4m3
    h_scale_ptr,  # [T * K, I / GROUP]
    expert_ptr,  # these three: lists
    count_ptr,
    list_ptr,
    w_ptr,  # [E, D, I]
    s_ptr,  # [E, blocks of D, blocks of I]
    y_ptr,  # [T * K, D] fp32
    tokens,
    D: tl.constexpr,
    I: tl.constexpr,
    GROUP: tl.constexpr,  # columns of h with a scale
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    group, first = tl.program_id(0) // (D // BLOCK_D), tl.program_id(0) % (D // BLOCK_D) * BLOCK_D
    # Complete: "gate_up" lets this kernel start only after its own wait for them. Not from L1, which may hold what was
    # there before.
    count = tl.load(count_ptr + group, cache_modifier=".cg")
    expert = tl.load(expert_ptr + group, cache_modifier=".cg").to(tl.int64)
    w_ptrs = w_ptr + expert * (D * I) + (first + tl.arange(0, BLOCK_D))[:, None] * I
    s_ptr += (expert * (D // BLOCK) + first // BLOCK) * (I // BLOCK)
    list_ptr += group * tokens
    if PDL:
        gdc_wait()
    out = (h_ptr, h_scale_ptr, w_ptrs, s_ptr, y_ptr, first)
    if WIDE > TOKENS and count <= TOKENS:
        place = tl.arange(0, TOKENS)
        pair = tl.load(list_ptr + place, mask=place < count, other=0, cache_modifier=".cg")
        if count > 0:
            _down(*out, pair, place < count, D, I, GROUP, BLOCK_D, STAGES)
    else:
        start = 0
        while start < count:
            wide = start + tl.arange(0, WIDE)
            pairs = tl.load(list_ptr + wide, mask=wide < count, other=0, cache_modifier=".cg")
            _down(*out, pairs, wide < count, D, I, GROUP, BLOCK_D, STAGES if WIDE == TOKENS else STAGES - 1)
            start += WIDE


def run_gate_up(
    x_TD: Tensor, x_scale: Tensor, lists: Lists, K: int, q_E2ID: Tensor, s_gate_up: Tensor, tile: Tile
) -> tuple[Tensor, Tensor]:
    """(silu(gate x) * up x of every pair over its scales, e4m3 [T * k, I]; those, [T * k, I / rows]). Those of x are
    [T] or, one for 128 columns, [T, D / 128]."""
    (T, D), I = x_TD.shape, q_E2ID.shape[1] // 2
    h_PI = torch.empty(T * K, I, dtype=x_TD.dtype, device=x_TD.device)
    h_scales_PB = torch.empty(T * K, I // tile.rows, device=x_TD.device)
    narrow_gate_up_kernel[(len(lists.count_G) * (I // tile.rows),)](
        x_TD,
        x_scale,
        *lists,
        q_E2ID,
        s_gate_up,
        h_PI,
        h_scales_PB,
        T,
        D=D,
        I=I,
        K=K,
        BLOCK_I=tile.rows,
        WIDE=tile.wide,
        X_BLOCKS=x_scale.dim() == 2,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **pdl_options(x_TD),
    )
    return h_PI, h_scales_PB


def run_down(h_PI: Tensor, h_scales_PB: Tensor, lists: Lists, q_EDI: Tensor, s_down: Tensor, tile: Tile) -> Tensor:
    """y [T * k, D] fp32 = down h of every pair."""
    (P, I), D = h_PI.shape, q_EDI.shape[1]
    y_PD = torch.empty(P, D, device=h_PI.device)
    narrow_down_kernel[(len(lists.count_G) * (D // tile.rows),)](
        h_PI,
        h_scales_PB,
        *lists,
        q_EDI,
        s_down,
        y_PD,
        lists.list_GT.shape[1],
        D=D,
        I=I,
        GROUP=I // h_scales_PB.shape[1],
        BLOCK_D=tile.rows,
        WIDE=tile.wide,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **pdl_options(h_PI),
    )
    return y_PD


def tiles(T: int, I: int) -> tuple[Tile, Tile]:
    """Of gate and up, and of down. Of more tokens many experts have more than a tile's: in narrow experts two tiles at
    a time are then faster, whose registers are too many beside 128 rows of gate and up."""
    if T <= 64 or I > NARROW:
        return Tile(128, 3, 8, TOKENS.value), Tile(128, 4, 8, TOKENS.value)
    return Tile(64, 4, 4, 2 * TOKENS.value), Tile(128, 4, 4, 2 * TOKENS.value)


def experts(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,
    own: tuple[Tensor, Tensor] | None = None,  # refused
    scale: float = 1.0,
    finish: Finish | None = None,
    next_norm: NextNorm | None = None,
) -> Tensor:
    if len(x_TD) == 0:
        out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
        return out_TD if finish is None else finish(out_TD)
    lists, narrow_TD, x_scale_T = list_pairs(x_TD, ids_Tk, len(down[0]), False, narrow=True)
    assert x_scale_T is not None
    y_PD = outputs(narrow_TD, x_scale_T, lists, ids_Tk.shape[1], gate_up, down)
    if finish is not None:
        return finish(y_PD, weights_Tk=weights_Tk)
    return summed(y_PD, weights_Tk, x_TD, residual_TD, next_norm)


def outputs(
    narrow_TD: Tensor,
    x_scale: Tensor,
    lists: Lists,
    K: int,
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
) -> Tensor:
    """Of every pair [T * k, D] fp32, of x in e4m3."""
    up_tile, down_tile = tiles(len(narrow_TD), down[0].shape[2])
    h_PI, h_scales_PB = run_gate_up(narrow_TD, x_scale, lists, K, *gate_up, up_tile)
    return run_down(h_PI, h_scales_PB, lists, *down, down_tile)


def summed(
    y_PD: Tensor,
    weights_Tk: Tensor,
    x_TD: Tensor,
    residual_TD: Tensor | None,
    next_norm: NextNorm | None,
    counts_E: Tensor | None = None,
) -> Tensor:
    """The weighted sum of the pairs' outputs, as x, plus the residual, and of few tokens the norm behind it."""
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    (T, D), weights = x_TD.shape, (weights_Tk, out_TD)
    if next_norm is None or not next_norm.wants_float8 or T > NORMED or D > MAX_NORMED:
        return weighted_sum(y_PD, *weights, residual_TD, counts_E=counts_E)
    normed_TD = torch.empty(T, D, dtype=torch.float8_e4m3fn, device=x_TD.device)
    scale_T = torch.empty(T, dtype=torch.float32, device=x_TD.device)
    norm = (normed_TD, next_norm.weight_D, next_norm.eps)
    weighted_sum_norm(y_PD, *weights, *norm, residual_TD, normed_scale_T=scale_T, counts_E=counts_E)
    next_norm.in_float8 = normed_TD, scale_T
    return out_TD
