"""Experts in fp8 in three launches, as ops/moe/triton_experts.py has them in bf16: what differs is the weights' way.

A weight goes from e4m3 to fp32 or to x's dtype in registers, which is exact. Its scale is applied once to the products
of a block of 128 columns, of which a program's rows have one each, not to every element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.config.quantization import BLOCK as _BLOCK
from thalweg.ops.moe.triton_experts import WIDE, _expert_of, _grouping, _load_row_tiles, _pairs_of, run_sum
from thalweg.ops.triton_launch import pdl_options

BLOCK = tl.constexpr(_BLOCK)
GEMV_TOKENS = 2
MAX_TOKENS = 512  # of one pass over the weights


@triton.jit
def _load_scales(s_ptr, count: tl.constexpr):
    scales = ()
    for c in tl.static_range(count):
        scales = scales + (tl.load(s_ptr + c),)
    return scales


@triton.jit
def _widen(q, dtype: tl.constexpr):
    """e4m3 to `dtype`, exactly. By way of fp32: straight to bf16 it is one conversion an element, at an eighth of the
    rate."""
    return q.to(tl.float32).to(dtype)


@triton.jit
def _products(w, x):
    """Sums of w * x over runs of 16 columns, which one thread holds: [rows, BLOCK] to [rows, BLOCK / 16]."""
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


@triton.jit
def _gate_up_tile(
    x_ptr,
    q_ptr,
    s_ptr,
    h_ptr,
    pair,
    count,
    first,
    x_stride,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h of `pair`, of which the first `count` are there, from one expert's rows `first` and on."""
    blocks_d: tl.constexpr = (D + BLOCK - 1) // BLOCK
    blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
    rows = first + tl.arange(0, BLOCK_I)
    cols = tl.arange(0, BLOCK_D)
    q_rows = tl.minimum(rows, I - 1)[None, :] * D
    x_rows = (pair // K)[:, None] * x_stride
    s_ptr += (first // BLOCK) * blocks_d
    gate = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
    up = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
    for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        gate_scale = tl.load(s_ptr + d // BLOCK)
        up_scale = tl.load(s_ptr + blocks_i * blocks_d + d // BLOCK)
        x_ptrs = x_ptr + x_rows + d + cols[None, :]
        q_ptrs = q_ptr + q_rows + d + cols[:, None]
        if D % BLOCK_D == 0:
            x = tl.load(x_ptrs)
            q_gate = tl.load(q_ptrs)
            q_up = tl.load(q_ptrs + I * D)
        else:
            x = tl.load(x_ptrs, mask=d + cols[None, :] < D, other=0.0)
            q_gate = tl.load(q_ptrs, mask=d + cols[:, None] < D, other=0.0)
            q_up = tl.load(q_ptrs + I * D, mask=d + cols[:, None] < D, other=0.0)
        gate += tl.dot(x, _widen(q_gate, x.dtype), input_precision="ieee") * gate_scale
        up += tl.dot(x, _widen(q_up, x.dtype), input_precision="ieee") * up_scale
    h = gate / (1.0 + tl.exp(-gate)) * up
    h_ptrs = h_ptr + pair[:, None] * I + rows[None, :]
    here = (tl.arange(0, BLOCK_T) < count)[:, None] & (rows < I)[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=here)


@triton.jit
def gate_up_expert_kernel(
    x_ptr,
    ids_ptr,
    q_ptr,
    s_ptr,
    h_ptr,
    pairs,
    x_stride,
    E: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    BY_PAIR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    first = (tl.program_id(0) % blocks) * BLOCK_I
    group = tl.program_id(0) // blocks
    expert = _expert_of(ids_ptr, group, pairs, E, BY_PAIR)
    pair, count = _pairs_of(ids_ptr, group, pairs, expert, 0, BY_PAIR, BLOCK_P, BLOCK_T)
    q_ptr += expert.to(tl.int64) * (2 * I * D)
    s_ptr += expert * (2 * ((I + BLOCK - 1) // BLOCK) * ((D + BLOCK - 1) // BLOCK))
    if count == 0:
        return
    if count <= BLOCK_T:
        _gate_up_tile(
            x_ptr, q_ptr, s_ptr, h_ptr, pair, count, first, x_stride, D, I, K, BLOCK_T, BLOCK_I, BLOCK_D, STAGES
        )
    else:
        start = 0
        while start < count:
            some, _ = _pairs_of(ids_ptr, group, pairs, expert, start, BY_PAIR, 32, WIDE)
            left = count - start
            # Half the depth, as the tile of tokens grows: registers and shared memory must not, for the rare case.
            _gate_up_tile(
                x_ptr, q_ptr, s_ptr, h_ptr, some, left, first, x_stride, D, I, K, WIDE, BLOCK_I, BLOCK_D // 2, STAGES
            )
            start += WIDE


@triton.jit
def _down_tile(
    h_ptr,
    q_ptr,
    s_ptr,
    y_ptr,
    pair,
    count,
    first,
    D: tl.constexpr,
    I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y of `pair`, of which the first `count` are there, from one expert's rows `first` and on."""
    blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
    rows = first + tl.arange(0, BLOCK_D)
    cols = tl.arange(0, BLOCK_I)
    q_rows = tl.minimum(rows, D - 1)[None, :] * I
    s_ptr += (first // BLOCK) * blocks_i
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i in tl.range(0, I, BLOCK_I, num_stages=STAGES):
        scale = tl.load(s_ptr + i // BLOCK)
        h_ptrs = h_ptr + pair[:, None] * I + i + cols[None, :]
        q_ptrs = q_ptr + q_rows + i + cols[:, None]
        if I % BLOCK_I == 0:
            h = tl.load(h_ptrs)
            q = tl.load(q_ptrs)
        else:
            h = tl.load(h_ptrs, mask=i + cols[None, :] < I, other=0.0)
            q = tl.load(q_ptrs, mask=i + cols[:, None] < I, other=0.0)
        acc += tl.dot(h, _widen(q, h.dtype), input_precision="ieee") * scale
    here = (tl.arange(0, BLOCK_T) < count)[:, None] & (rows < D)[None, :]
    tl.store(y_ptr + pair[:, None] * D + rows[None, :], acc, mask=here)


@triton.jit
def down_expert_kernel(
    h_ptr,
    ids_ptr,
    q_ptr,
    s_ptr,
    y_ptr,  # [T * K, D] fp32
    pairs,
    E: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    BY_PAIR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    first = (tl.program_id(0) % blocks) * BLOCK_D
    group = tl.program_id(0) // blocks
    # Before the wait, as in down_pair_kernel.
    expert = _expert_of(ids_ptr, group, pairs, E, BY_PAIR)
    pair, count = _pairs_of(ids_ptr, group, pairs, expert, 0, BY_PAIR, BLOCK_P, BLOCK_T)
    q_ptr += expert.to(tl.int64) * (D * I)
    s_ptr += expert * (((D + BLOCK - 1) // BLOCK) * ((I + BLOCK - 1) // BLOCK))
    if PDL:
        gdc_wait()
    if count == 0:
        return
    if count <= BLOCK_T:
        _down_tile(h_ptr, q_ptr, s_ptr, y_ptr, pair, count, first, D, I, BLOCK_T, BLOCK_D, BLOCK_I, STAGES)
    else:
        start = 0
        while start < count:
            some, _ = _pairs_of(ids_ptr, group, pairs, expert, start, BY_PAIR, 32, WIDE)
            left = count - start
            _down_tile(h_ptr, q_ptr, s_ptr, y_ptr, some, left, first, D, I, WIDE, BLOCK_D, BLOCK_I // 2, STAGES)
            start += WIDE


def experts_fp8(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    q_gate_up_E2ID: Tensor,
    s_gate_up: Tensor,
    q_down_EDI: Tensor,
    s_down: Tensor,
    num_shared: int = 0,
) -> Tensor:
    T = x_TD.shape[0]
    if T == 0:
        return torch.empty_like(x_TD)
    if T > MAX_TOKENS:
        slices = [t.split(MAX_TOKENS) for t in (x_TD, weights_Tk, ids_Tk)]
        quantized = (q_gate_up_E2ID, s_gate_up, q_down_EDI, s_down, num_shared)
        return torch.cat([experts_fp8(x, w, ids, *quantized) for x, w, ids in zip(*slices, strict=True)])
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    if T <= GEMV_TOKENS:
        h_PI = run_gate_up_pairs(x_TD, ids_Tk, q_gate_up_E2ID, s_gate_up, num_shared)
        y_PD = run_down_pairs(h_PI, ids_Tk, q_down_EDI, s_down)
    else:
        h_PI = run_gate_up_experts(x_TD, ids_Tk, q_gate_up_E2ID, s_gate_up)
        y_PD = run_down_experts(h_PI, ids_Tk, q_down_EDI, s_down)
    return run_sum(y_PD, weights_Tk, x_TD.dtype)


def run_gate_up_pairs(
    x_TD: Tensor, ids_Tk: Tensor, q_E2ID: Tensor, s_gate_up: Tensor, num_shared: int, block: int = 4, warps: int = 1
) -> Tensor:
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
    h_PI: Tensor, ids_Tk: Tensor, q_EDI: Tensor, s_down: Tensor, block: int = 16, warps: int = 4
) -> Tensor:
    _, D, I = q_EDI.shape
    P = ids_Tk.numel()
    y_PD = torch.empty(P, D, dtype=torch.float32, device=h_PI.device)
    down_pair_kernel[(P * triton.cdiv(D, block),)](
        h_PI, ids_Tk, q_EDI, s_down, y_PD, D=D, I=I, BLOCK_D=block, num_warps=warps, **pdl_options(h_PI)
    )
    return y_PD


def run_gate_up_experts(
    x_TD: Tensor,
    ids_Tk: Tensor,
    q_E2ID: Tensor,
    s_gate_up: Tensor,
    block: int = 64,
    depth: int = _BLOCK,  # divides _BLOCK
    stages: int = 4,
    warps: int = 4,
    rows: int = 16,
    registers: int | None = None,
) -> Tensor:
    (E, I2, D), (T, K) = q_E2ID.shape, ids_Tk.shape
    I = I2 // 2
    h_PI = torch.empty(T * K, I, dtype=x_TD.dtype, device=x_TD.device)
    groups, grouping = _grouping(T, K, E)
    gate_up_expert_kernel[(groups * triton.cdiv(I, block),)](
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
        **grouping,
        BLOCK_T=rows,
        BLOCK_I=block,
        BLOCK_D=depth,
        STAGES=stages,
        num_warps=warps,
        maxnreg=registers,
        **pdl_options(x_TD),
    )
    return h_PI


def run_down_experts(
    h_PI: Tensor,
    ids_Tk: Tensor,
    q_EDI: Tensor,
    s_down: Tensor,
    block: int = 128,
    depth: int = _BLOCK,  # divides _BLOCK
    stages: int = 4,
    warps: int = 4,
    rows: int = 16,
    registers: int | None = None,
) -> Tensor:
    (E, D, I), (T, K) = q_EDI.shape, ids_Tk.shape
    y_PD = torch.empty(T * K, D, dtype=torch.float32, device=h_PI.device)
    groups, grouping = _grouping(T, K, E)
    down_expert_kernel[(groups * triton.cdiv(D, block),)](
        h_PI,
        ids_Tk,
        q_EDI,
        s_down,
        y_PD,
        T * K,
        E=E,
        D=D,
        I=I,
        **grouping,
        BLOCK_T=rows,
        BLOCK_D=block,
        BLOCK_I=depth,
        STAGES=stages,
        num_warps=warps,
        maxnreg=registers,
        **pdl_options(h_PI),
    )
    return y_PD
