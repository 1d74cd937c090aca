"""Experts for a batch of tokens over weights in fp8, with activations in fp8 too, in two launches: as `narrow`, without
one ahead that lists pairs and quantizes x, and without one behind for the weighted sum.

Each program of gate and up finds its expert's pairs by scanning the ids, and quantizes 128 columns of their rows of x
at a time: that is little beside the weights that it streams meanwhile, if these are many. In down whoever comes last to
a strip of a token's columns adds up what all have there, in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.moe.experts import JOINED_TOKENS, Finish
from thalweg.ops.moe.experts.arrivals import arrivals
from thalweg.ops.moe.experts.triton.grouping import (
    Lists,
    Scan,
    empty_lists,
    expert_of_group,
    pairs_of_group,
    scan_of,
)
from thalweg.ops.moe.experts.triton.narrow import Tile
from thalweg.ops.moe.experts.triton.narrow_kernels import BLOCK, TOKENS, down_sums, store_quantized
from thalweg.ops.moe.experts.triton.products import silu_and_mul
from thalweg.ops.products.triton import LARGEST, SMALLEST
from thalweg.ops.toolchain.triton_dot import dot
from thalweg.ops.toolchain.triton_launch import pdl_options


@triton.jit
def _gate_up(
    x_ptr,
    w_ptr,  # gate's first row of the program
    s_ptr,  # of gate's blocks
    h_ptr,
    h_scale_ptr,
    first,
    pair,  # [tokens]
    here,
    x_stride,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    d = tl.arange(0, DEPTH)
    x_ptrs = x_ptr + (pair // K)[None, :] * x_stride + d[:, None]
    w_ptrs = w_ptr + tl.arange(0, BLOCK_I)[:, None] * D + d[None, :]
    s_up_ptr = s_ptr + I // BLOCK * (D // BLOCK)
    gate = tl.zeros([BLOCK_I, pair.shape[0]], tl.float32)
    up = tl.zeros([BLOCK_I, pair.shape[0]], tl.float32)
    for at in tl.range(0, D, DEPTH, num_stages=STAGES):
        gate_scale = tl.load(s_ptr + at // BLOCK)
        up_scale = tl.load(s_up_ptr + at // BLOCK)
        x = tl.load(x_ptrs + at).to(tl.float32)
        w_gate = tl.load(w_ptrs + at)
        w_up = tl.load(w_ptrs + I * D + at)
        scale = tl.maximum(tl.max(tl.abs(x), 0), SMALLEST) * (1 / LARGEST)
        q = (x * (1 / scale)[None, :]).to(w_gate.dtype)
        gate += dot(w_gate, q) * (gate_scale * scale)[None, :]
        up += dot(w_up, q) * (up_scale * scale)[None, :]
    store_quantized(silu_and_mul(gate, up), h_ptr, h_scale_ptr, first, pair, here, I, BLOCK_I)


@triton.jit
def joined_gate_up_kernel(
    x_ptr,  # [T, D]
    ids_ptr,
    expert_ptr,  # these three: lists, which are made here
    count_ptr,
    list_ptr,
    w_ptr,  # [E, 2I, D]
    s_ptr,  # [E, 2 blocks of I, blocks of D]
    h_ptr,  # [T * K, I] e4m3
    h_scale_ptr,  # [T * K, I / BLOCK_I]
    pairs,
    tokens,
    x_stride,
    E: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    BY_PAIR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
    WIDE: tl.constexpr,  # tokens at a time if more than TOKENS chose an expert
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    group, first = tl.program_id(0) // (I // BLOCK_I), tl.program_id(0) % (I // BLOCK_I) * BLOCK_I
    expert = expert_of_group(ids_ptr, group, pairs, E, BY_PAIR)
    pair, count = pairs_of_group(ids_ptr, group, pairs, expert, 0, BY_PAIR, BLOCK_P, TOKENS)
    list_ptr += group * tokens
    place = tl.arange(0, TOKENS)
    if first == 0:
        tl.store(count_ptr + group, count)
        tl.store(expert_ptr + group, expert)
        tl.store(list_ptr + place, pair, mask=place < count)
    if count == 0:
        return
    w_ptr += expert.to(tl.int64) * (2 * I * D) + first * D
    s_ptr += (expert * (2 * I // BLOCK) + first // BLOCK) * (D // BLOCK)
    out = (x_ptr, w_ptr, s_ptr, h_ptr, h_scale_ptr, first)
    if count <= TOKENS:
        _gate_up(*out, pair, place < count, x_stride, D, I, K, BLOCK_I, BLOCK, STAGES)
    else:
        start = 0
        while start < count:
            some, _ = pairs_of_group(ids_ptr, group, pairs, expert, start, BY_PAIR, 32, WIDE)
            wide = start + tl.arange(0, WIDE)
            if first == 0:
                tl.store(list_ptr + wide, some, mask=wide < count)
            _gate_up(*out, some, wide < count, x_stride, D, I, K, BLOCK_I, BLOCK * TOKENS // WIDE, STAGES)
            start += WIDE


@triton.jit
def _down(
    h_ptr,
    h_scale_ptr,
    w_ptr,  # the program's first row
    s_ptr,
    parts_ptr,
    weights_ptr,
    residual_ptr,
    y_ptr,
    arrived_ptr,
    first,
    pair,
    here,
    residual_stride,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    w_ptrs = w_ptr + tl.arange(0, BLOCK_D)[:, None] * I
    sums = down_sums(h_ptr, h_scale_ptr, w_ptrs, s_ptr, pair, I, GROUP, DEPTH, BLOCK_D, STAGES)
    rows = first + tl.arange(0, BLOCK_D)
    tl.store(parts_ptr + pair[:, None] * D + rows[None, :], tl.trans(sums), mask=here[:, None])
    if y_ptr is not None:
        token = pair // K
        tl.debug_barrier()
        strips = arrived_ptr + token * (D // BLOCK_D) + first // BLOCK_D
        last = here & (tl.atomic_add(strips, 1, mask=here, sem="acq_rel") == K - 1)
        tl.debug_barrier()
        if tl.max(last.to(tl.int32), 0) > 0:
            tl.store(strips, 0, mask=last)
            total = tl.zeros([pair.shape[0], BLOCK_D], tl.float32)
            for k in tl.static_range(K):
                part_ptrs = parts_ptr + (token * K + k)[:, None] * D + rows[None, :]
                part = tl.load(part_ptrs, mask=last[:, None], other=0.0, cache_modifier=".cg")
                total += tl.load(weights_ptr + token * K + k)[:, None] * part
            if residual_ptr is not None:
                residual_ptrs = residual_ptr + token.to(tl.int64)[:, None] * residual_stride + rows[None, :]
                total += tl.load(residual_ptrs, mask=last[:, None], other=0.0).to(tl.float32)
            y_ptrs = y_ptr + token[:, None] * D + rows[None, :]
            tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=last[:, None])


@triton.jit
def joined_down_kernel(
    h_ptr,  # [T * K, I] e4m3
    h_scale_ptr,  # [T * K, I / GROUP]
    expert_ptr,  # these three: lists
    count_ptr,
    list_ptr,
    w_ptr,  # [E, D, I]
    s_ptr,  # [E, blocks of D, blocks of I]
    parts_ptr,  # [T * K, D] fp32
    weights_ptr,  # [T, K]
    residual_ptr,  # or None
    y_ptr,  # [T, D], or None: then parts are the result
    arrived_ptr,  # how many came to a strip of a token: zero before and after
    tokens,
    residual_stride,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,  # columns of h with a scale
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    group, first = tl.program_id(0) // (D // BLOCK_D), tl.program_id(0) % (D // BLOCK_D) * BLOCK_D
    count = tl.load(count_ptr + group)
    if count == 0:
        return
    expert = tl.load(expert_ptr + group)
    w_ptr += expert.to(tl.int64) * (D * I) + first * I
    s_ptr += (expert * (D // BLOCK) + first // BLOCK) * (I // BLOCK)
    list_ptr += group * tokens
    out = (h_ptr, h_scale_ptr, w_ptr, s_ptr, parts_ptr, weights_ptr, residual_ptr, y_ptr, arrived_ptr, first)
    if count <= TOKENS:
        place = tl.arange(0, TOKENS)
        pair = tl.load(list_ptr + place, mask=place < count, other=0)
        _down(*out, pair, place < count, residual_stride, D, I, K, GROUP, GROUP, BLOCK_D, STAGES)
    else:
        start = 0
        while start < count:
            wide = start + tl.arange(0, WIDE)
            pair = tl.load(list_ptr + wide, mask=wide < count, other=0)
            _down(*out, pair, wide < count, residual_stride, D, I, K, GROUP, GROUP * TOKENS // WIDE, BLOCK_D, STAGES)
            start += WIDE


def run_gate_up(
    x_TD: Tensor, ids_Tk: Tensor, lists: Lists, scan: Scan, q_E2ID: Tensor, s_gate_up: Tensor, tile: Tile
) -> tuple[Tensor, Tensor]:
    """(silu(gate x) * up x of every pair over its scales, e4m3 [T * k, I]; those, [T * k, I / rows]); and the lists."""
    (T, K), D, I = ids_Tk.shape, x_TD.shape[1], q_E2ID.shape[1] // 2
    h_PI = torch.empty(T * K, I, dtype=q_E2ID.dtype, device=x_TD.device)
    h_scales_PB = torch.empty(T * K, I // tile.rows, device=x_TD.device)
    joined_gate_up_kernel[(scan.groups * (I // tile.rows),)](
        x_TD,
        ids_Tk,
        *lists,
        q_E2ID,
        s_gate_up,
        h_PI,
        h_scales_PB,
        T * K,
        T,
        x_TD.stride(0),
        E=len(q_E2ID),
        D=D,
        I=I,
        K=K,
        BY_PAIR=scan.by_pair,
        BLOCK_P=scan.ids,
        BLOCK_I=tile.rows,
        WIDE=tile.wide,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **pdl_options(x_TD),
    )
    return h_PI, h_scales_PB


def run_down(
    h_PI: Tensor,
    h_scales_PB: Tensor,
    lists: Lists,
    q_EDI: Tensor,
    s_down: Tensor,
    weights_Tk: Tensor,
    y_TD: Tensor | None,
    residual_TD: Tensor | None,
    tile: Tile,
) -> Tensor:
    """y_TD, the weighted sum over a token's experts of down h, plus the residual; without it what every pair adds to
    it, [T * k, D] fp32."""
    (P, I), D, device = h_PI.shape, q_EDI.shape[1], h_PI.device
    parts_PD = torch.empty(P, D, device=device)
    joined_down_kernel[(len(lists.count_G) * (D // tile.rows),)](
        h_PI,
        h_scales_PB,
        *lists,
        q_EDI,
        s_down,
        parts_PD,
        weights_Tk,
        residual_TD,
        y_TD,
        arrivals(device, JOINED_TOKENS * D),
        lists.list_GT.shape[1],
        0 if residual_TD is None else residual_TD.stride(0),
        D=D,
        I=I,
        K=weights_Tk.shape[1],
        GROUP=I // h_scales_PB.shape[1],
        BLOCK_D=tile.rows,
        WIDE=tile.wide,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **pdl_options(h_PI),
    )
    return parts_PD if y_TD is None else y_TD


GATE_UP, DOWN = Tile(128, 3, 8, TOKENS.value), Tile(128, 4, 8, TOKENS.value)


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
) -> Tensor:
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if len(x_TD) == 0:
        return out_TD if finish is None else finish(out_TD)
    scan = scan_of(ids_Tk.numel(), len(down[0]), 256)
    lists = empty_lists(scan.groups, len(x_TD), x_TD.device)
    h = run_gate_up(x_TD, ids_Tk, lists, scan, *gate_up, GATE_UP)
    y_TD = run_down(*h, lists, *down, weights_Tk, out_TD if finish is None else None, residual_TD, DOWN)
    return y_TD if finish is None else finish(y_TD, weights_Tk=weights_Tk)
