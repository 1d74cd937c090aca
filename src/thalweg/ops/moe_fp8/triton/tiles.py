"""Experts in fp8 for a batch of tokens, in three launches: lists of each expert's pairs, gate and up with SiLU, down.

A program takes a block of rows of one expert for all tokens that chose it, 16 at a time. What bounds it, beside the
memory, is the widening of weights in registers. To fp16 that is one instruction for two, to bf16 four; so gate and up
take x in fp16, each row scaled by a power of two to just below fp16's largest, which loses nothing but what is below
2^-29 of the row's largest element. A weight's scale is applied once to the products of a block of 128 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.toolchain.triton_dot import dot
from thalweg.ops.toolchain.triton_launch import pdl_options
from thalweg.quant.fp8 import BLOCK as _BLOCK

BLOCK = tl.constexpr(_BLOCK)
TOKENS = 16  # of a tile
SMALL_BATCH = 128  # above, an expert's tokens are several tiles one after the other: finer blocks spread them


@triton.jit
def store_half_row(x_ptr, half_ptr, scale_ptr, token, x_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A row of x in fp16, times a power of two, and the inverse of that."""
    cols = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + token * x_stride + cols, mask=cols < D, other=0.0).to(tl.float32)
    # The powers of two are put together from their bits: the largest lands in [2^14, 2^15), and NaN stays NaN.
    exponent = tl.max(tl.abs(x), 0).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 15), 253)
    x *= ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(half_ptr + token * D + cols, x.to(tl.float16), mask=cols < D)
    tl.store(scale_ptr + token, ((exponent - 14) << 23).to(tl.float32, bitcast=True))


@triton.jit
def list_kernel(
    ids_ptr,
    x_ptr,
    expert_ptr,  # [groups]
    count_ptr,  # [groups]
    list_ptr,  # [groups, T]
    half_ptr,  # [T, D] fp16
    scale_ptr,  # [T] fp32
    pairs,
    tokens,
    groups,
    x_stride,
    E: tl.constexpr,
    D: tl.constexpr,
    BY_PAIR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """A group's pairs, in order, and after the groups a row of x in fp16.

    A group is an expert, or with BY_PAIR a pair that stands for its expert if it is the last that chose it, and has
    no pairs otherwise. The last come first: shared experts, chosen by every token, have the most work.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    group = tl.program_id(0)
    if group < groups:
        if BY_PAIR:
            expert = tl.load(ids_ptr + pairs - 1 - group).to(tl.int32)
        else:
            expert = E - 1 - group
        count = 0
        last = -1
        p = 0
        while p < pairs:
            pair = p + tl.arange(0, BLOCK_P)
            same = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32) == expert
            place = count + tl.cumsum(same.to(tl.int32), 0) - 1
            tl.store(list_ptr + group * tokens + place, pair, mask=same)
            count += tl.sum(same.to(tl.int32), 0)
            last = tl.maximum(last, tl.max(tl.where(same, pair, -1), 0))
            p += BLOCK_P
        if BY_PAIR:
            count = tl.where(last == pairs - 1 - group, count, 0)
        tl.store(count_ptr + group, count)
        tl.store(expert_ptr + group, expert)
    else:
        store_half_row(x_ptr, half_ptr, scale_ptr, (group - groups).to(tl.int64), x_stride, D, BLOCK_D)


@triton.jit
def _widen(q, dtype: tl.constexpr):
    """e4m3 to `dtype`, exactly. To bf16 by way of fp32: straight, it is one conversion an element at 1/8 the rate."""
    if dtype == tl.bfloat16:
        return q.to(tl.float32).to(tl.bfloat16)
    else:
        return q.to(dtype)


@triton.jit
def gate_up_tile_kernel(
    x_ptr,  # fp16 and scaled, or fp32
    scale_ptr,  # of x's rows
    q_ptr,  # [E, 2I, D] e4m3
    s_ptr,  # [E, 2 * blocks of I, blocks of D]
    h_ptr,  # [T * K, I]
    expert_ptr,
    count_ptr,
    list_ptr,
    tokens,
    x_stride,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,  # divides BLOCK
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        # Only after the wait may "down" start: it reads the lists before its own, and they are complete here.
        gdc_wait()
        gdc_launch_dependents()
    blocks: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    blocks_d: tl.constexpr = (D + BLOCK - 1) // BLOCK
    blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
    first = (tl.program_id(0) % blocks) * BLOCK_I
    group = tl.program_id(0) // blocks
    count = tl.load(count_ptr + group)
    expert = tl.load(expert_ptr + group)
    s_ptr += (expert * (2 * blocks_i) + first // BLOCK) * blocks_d
    rows = first + tl.arange(0, BLOCK_I)
    cols = tl.arange(0, BLOCK)
    q_ptrs = q_ptr + expert.to(tl.int64) * (2 * I * D) + tl.minimum(rows, I - 1)[None, :] * D + cols[:, None]
    start = 0
    while start < count:
        slots = start + tl.arange(0, BLOCK_T)
        pair = tl.load(list_ptr + group * tokens + slots, mask=slots < count, other=0)
        x_ptrs = x_ptr + (pair // K)[:, None] * x_stride + cols[None, :]
        gate = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
        up = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
        for d in tl.range(0, D, BLOCK, num_stages=STAGES):
            gate_scale = tl.load(s_ptr + d // BLOCK)
            up_scale = tl.load(s_ptr + blocks_i * blocks_d + d // BLOCK)
            if D == blocks_d * BLOCK:
                x = tl.load(x_ptrs + d)
                q_gate = tl.load(q_ptrs + d)
                q_up = tl.load(q_ptrs + d + I * D)
            else:
                x = tl.load(x_ptrs + d, mask=d + cols[None, :] < D, other=0.0)
                q_gate = tl.load(q_ptrs + d, mask=d + cols[:, None] < D, other=0.0)
                q_up = tl.load(q_ptrs + d + I * D, mask=d + cols[:, None] < D, other=0.0)
            gate += dot(x, _widen(q_gate, x.dtype)) * gate_scale
            up += dot(x, _widen(q_up, x.dtype)) * up_scale
        if SCALED:
            scale = tl.load(scale_ptr + pair // K)[:, None]
            gate *= scale
            up *= scale
        h = gate / (1.0 + tl.exp(-gate)) * up
        here = (slots < count)[:, None] & (rows < I)[None, :]
        tl.store(h_ptr + pair[:, None] * I + rows[None, :], h.to(h_ptr.dtype.element_ty), mask=here)
        start += BLOCK_T


@triton.jit
def down_tile_kernel(
    h_ptr,
    q_ptr,  # [E, D, I] e4m3
    s_ptr,  # [E, blocks of D, blocks of I]
    y_ptr,  # [T * K, D] fp32
    expert_ptr,
    count_ptr,
    list_ptr,
    tokens,
    D: tl.constexpr,
    I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,  # divides BLOCK, or is twice as much
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    blocks_d: tl.constexpr = (D + BLOCK - 1) // BLOCK
    blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
    first = (tl.program_id(0) % blocks) * BLOCK_D
    group = tl.program_id(0) // blocks
    # The lists are complete: "gate_up" lets this kernel start only after its own wait for them. Not from L1, which may
    # hold what was there before.
    count = tl.load(count_ptr + group, cache_modifier=".cg")
    expert = tl.load(expert_ptr + group, cache_modifier=".cg")
    upper = s_ptr + (expert * blocks_d + first // BLOCK) * blocks_i
    lower = s_ptr + (expert * blocks_d + tl.minimum(first // BLOCK + 1, blocks_d - 1)) * blocks_i
    rows = first + tl.arange(0, BLOCK_D)
    cols = tl.arange(0, BLOCK)
    q_ptrs = q_ptr + expert.to(tl.int64) * (D * I) + tl.minimum(rows, D - 1)[None, :] * I + cols[:, None]
    if PDL:
        gdc_wait()
    start = 0
    while start < count:
        slots = start + tl.arange(0, BLOCK_T)
        pair = tl.load(list_ptr + group * tokens + slots, mask=slots < count, other=0)
        h_ptrs = h_ptr + pair[:, None] * I + cols[None, :]
        acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for i in tl.range(0, I, BLOCK, num_stages=STAGES):
            scale = tl.load(upper + i // BLOCK)
            if I == blocks_i * BLOCK:
                h = tl.load(h_ptrs + i)
                q = tl.load(q_ptrs + i)
            else:
                h = tl.load(h_ptrs + i, mask=i + cols[None, :] < I, other=0.0)
                q = tl.load(q_ptrs + i, mask=i + cols[:, None] < I, other=0.0)
            if BLOCK_D > BLOCK:
                scale = tl.where(tl.arange(0, BLOCK_D) < BLOCK, scale, tl.load(lower + i // BLOCK))[None, :]
            acc += dot(h, _widen(q, h.dtype)) * scale
        here = (slots < count)[:, None] & (rows < D)[None, :]
        tl.store(y_ptr + pair[:, None] * D + rows[None, :], acc, mask=here)
        start += BLOCK_T


@dataclass(frozen=True, slots=True)
class Lists:
    """Who works on what: group g of the launches is expert_G[g] for its first count_G[g] pairs of list_GT[g]."""

    expert_G: Tensor
    count_G: Tensor
    list_GT: Tensor
    x_TD: Tensor  # what "gate_up" reads: fp16, or x itself where that is float32
    scale_T: Tensor  # fp32: x is x_TD times this, where that is fp16


def run_lists(x_TD: Tensor, ids_Tk: Tensor, num_experts: int) -> Lists:
    (T, D), P, device = x_TD.shape, ids_Tk.numel(), x_TD.device
    by_pair = num_experts > P
    groups = min(P, num_experts)
    half = x_TD.dtype != torch.float32
    expert_G, count_G = (torch.empty(groups, dtype=torch.int32, device=device) for _ in range(2))
    list_GT = torch.empty(groups, T, dtype=torch.int32, device=device)
    half_TD = torch.empty(T, D, dtype=torch.float16, device=device) if half else x_TD
    scale_T = torch.empty(T, device=device)
    list_kernel[(groups + T if half else groups,)](
        ids_Tk,
        x_TD,
        expert_G,
        count_G,
        list_GT,
        half_TD,
        scale_T,
        P,
        T,
        groups,
        x_TD.stride(0),
        E=num_experts,
        D=D,
        BY_PAIR=by_pair,
        BLOCK_P=min(1024, max(16, triton.next_power_of_2(P))),
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=4,
        **pdl_options(x_TD),
    )
    return Lists(expert_G, count_G, list_GT, half_TD, scale_T)


def run_gate_up_tiles(
    x_TD: Tensor,
    lists: Lists,
    top_k: int,
    q_E2ID: Tensor,
    s_gate_up: Tensor,
    block: int | None = None,
    stages: int = 4,
    warps: int | None = None,
) -> Tensor:
    """h [T * k, I] = silu(gate x) * up x of every pair, in x's dtype."""
    (T, D), I = x_TD.shape, q_E2ID.shape[1] // 2
    h_PI = torch.empty(T * top_k, I, dtype=x_TD.dtype, device=x_TD.device)
    half = lists.x_TD.dtype == torch.float16
    if block is None or warps is None:
        # float32 has no tensor cores: a small tile, for registers.
        block, warps, stages = ((128, 8, stages) if T <= SMALL_BATCH else (64, 4, stages)) if half else (16, 4, 1)
    gate_up_tile_kernel[(len(lists.count_G) * triton.cdiv(I, block),)](
        lists.x_TD,
        lists.scale_T,
        q_E2ID,
        s_gate_up,
        h_PI,
        lists.expert_G,
        lists.count_G,
        lists.list_GT,
        T,
        lists.x_TD.stride(0),
        D=D,
        I=I,
        K=top_k,
        SCALED=half,
        BLOCK_T=TOKENS,
        BLOCK_I=block,
        STAGES=stages,
        num_warps=warps,
        **pdl_options(x_TD),
    )
    return h_PI


def run_down_tiles(
    h_PI: Tensor,
    lists: Lists,
    q_EDI: Tensor,
    s_down: Tensor,
    block: int | None = None,
    stages: int = 4,
    warps: int | None = None,
) -> Tensor:
    """y [T * k, D] fp32 = down h of every pair."""
    (_, D, I), T = q_EDI.shape, lists.list_GT.shape[1]
    y_PD = torch.empty(h_PI.shape[0], D, dtype=torch.float32, device=h_PI.device)
    if block is None or warps is None:
        half = lists.x_TD.dtype == torch.float16
        block, warps, stages = ((256, 8, stages) if T <= SMALL_BATCH else (128, 4, 3)) if half else (16, 4, 1)
    down_tile_kernel[(len(lists.count_G) * triton.cdiv(D, block),)](
        h_PI,
        q_EDI,
        s_down,
        y_PD,
        lists.expert_G,
        lists.count_G,
        lists.list_GT,
        T,
        D=D,
        I=I,
        BLOCK_T=TOKENS,
        BLOCK_D=block,
        STAGES=stages,
        num_warps=warps,
        **pdl_options(h_PI),
    )
    return y_PD
