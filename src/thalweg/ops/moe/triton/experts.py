"""Routed experts in three launches for decode: gate and up with SiLU, down, and what ends a token (finish.py).

Pairs, for a token or two: one program takes a few rows of one (token, expert) pair. Tiles: a program takes a block of
rows of one expert for all tokens that chose it, which it finds by scanning the ids itself: no sort. The sum has one
fixed order, in a launch of its own: leaving it to the last program of a token to finish took longer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.moe.triton.finish import weighted_sum
from thalweg.ops.toolchain.triton_launch import pdl_options

WIDE = tl.constexpr(64)  # tokens of a tile where more than the usual 16 chose an expert


@triton.jit
def _load_row_tiles(w_ptrs, cols, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows at w_ptrs as a tuple of tiles of BLOCK_D columns, held in registers."""
    tiles = ()
    for c in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        if (c + 1) * BLOCK_D <= D:
            tiles = tiles + (tl.load(w_ptrs + c * BLOCK_D),)
        else:
            tiles = tiles + (tl.load(w_ptrs + c * BLOCK_D, mask=c * BLOCK_D + cols[None, :] < D, other=0.0),)
    return tiles


@triton.jit
def gate_up_pair_kernel(
    x_ptr,
    ids_ptr,
    w_ptr,  # [E, 2I, D]
    h_ptr,  # [T * K, I]
    pairs,
    x_stride,
    E: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    blocks: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    # Backwards, so that the shared experts come first: their weights are known before the router is done.
    pair = pairs - 1 - tl.program_id(0) // blocks
    expert = E - K + pair % K
    if pair % K < K - SHARED:
        if PDL:
            gdc_wait()
        expert = tl.load(ids_ptr + pair).to(tl.int32)
    rows = (tl.program_id(0) % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    cols = tl.arange(0, BLOCK_D)
    gate_ptrs = w_ptr + (expert.to(tl.int64) * (2 * I) + tl.minimum(rows, I - 1))[:, None] * D + cols[None, :]
    gate_tiles = _load_row_tiles(gate_ptrs, cols, D, BLOCK_D)
    up_tiles = _load_row_tiles(gate_ptrs + I * D, cols, D, BLOCK_D)
    if PDL:
        # Only now may "down" start: it reads ids before its own wait, and they are complete here.
        gdc_wait()
        gdc_launch_dependents()
    x_tiles = _load_row_tiles(x_ptr + (pair // K) * x_stride + (rows * 0)[:, None] + cols[None, :], cols, D, BLOCK_D)
    gate = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    up = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for c in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        x = x_tiles[c].to(tl.float32)
        gate += gate_tiles[c].to(tl.float32) * x
        up += up_tiles[c].to(tl.float32) * x
    gate_sum = tl.sum(gate, 1)
    h = gate_sum / (1.0 + tl.exp(-gate_sum)) * tl.sum(up, 1)
    tl.store(h_ptr + pair * I + rows, h.to(h_ptr.dtype.element_ty), mask=rows < I)


@triton.jit
def down_pair_kernel(
    h_ptr,
    ids_ptr,
    w_ptr,  # [E, D, I]
    y_ptr,  # [T * K, D] fp32
    D: tl.constexpr,
    I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pair = tl.program_id(0) // blocks
    rows = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    cols = tl.arange(0, BLOCK_I)
    # The ids are complete: "gate_up" lets this kernel start only after its own wait for them. Not from L1, which may
    # hold what was there before.
    expert = tl.load(ids_ptr + pair, cache_modifier=".cg").to(tl.int64)
    w_ptrs = w_ptr + (expert * D + tl.minimum(rows, D - 1))[:, None] * I + cols[None, :]
    tiles = _load_row_tiles(w_ptrs, cols, I, BLOCK_I)
    if PDL:
        gdc_wait()
    h_tiles = _load_row_tiles(h_ptr + pair * I + (rows * 0)[:, None] + cols[None, :], cols, I, BLOCK_I)
    acc = tl.zeros([BLOCK_D, BLOCK_I], tl.float32)
    for c in tl.static_range((I + BLOCK_I - 1) // BLOCK_I):
        acc += tiles[c].to(tl.float32) * h_tiles[c].to(tl.float32)
    tl.store(y_ptr + pair * D + rows, tl.sum(acc, 1), mask=rows < D)


@triton.jit
def _expert_of(ids_ptr, group, pairs, E: tl.constexpr, BY_PAIR: tl.constexpr):
    """The expert of a group: a group is an expert, or with BY_PAIR a pair that may stand for its expert.

    The last come first: shared experts, chosen by every token, have the most work.
    """
    if BY_PAIR:
        expert = tl.load(ids_ptr + pairs - 1 - group, cache_modifier=".cg").to(tl.int32)
    else:
        expert = E - 1 - group
    return expert


@triton.jit
def _pairs_of(
    ids_ptr, group, pairs, expert, start, BY_PAIR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr
):
    """(the pairs start .. start + BLOCK_T - 1 among those that chose `expert`, how many chose it in all).

    With BY_PAIR only the last pair that chose an expert stands for it, for another the number is 0. Entries past
    the number are pair 0. Ids are not read from L1, which may hold what was there before.
    """
    pair = tl.zeros([BLOCK_T], tl.int32)
    count = 0
    slots = start + tl.arange(0, BLOCK_T)
    last = -1
    p = 0
    while p < pairs:
        offsets = p + tl.arange(0, BLOCK_P)
        same = tl.load(ids_ptr + offsets, mask=offsets < pairs, other=-1, cache_modifier=".cg").to(tl.int32) == expert
        order = tl.where(same, count + tl.cumsum(same.to(tl.int32), 0) - 1, -1)
        pair += tl.sum(tl.where(order[None, :] == slots[:, None], offsets[None, :], 0), 1)
        count += tl.sum(same.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(same, offsets, -1), 0))
        p += BLOCK_P
    if BY_PAIR:
        count = tl.where(last == pairs - 1 - group, count, 0)
    return pair, count


@triton.jit
def _gate_up_tile(
    x_ptr,
    w_ptr,
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
    rows = first + tl.arange(0, BLOCK_I)
    cols = tl.arange(0, BLOCK_D)
    w_rows = tl.minimum(rows, I - 1)[None, :] * D
    x_rows = (pair // K)[:, None] * x_stride
    gate = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
    up = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
    for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        x_ptrs = x_ptr + x_rows + d + cols[None, :]
        w_ptrs = w_ptr + w_rows + d + cols[:, None]
        if D % BLOCK_D == 0:
            x = tl.load(x_ptrs)
            w_gate = tl.load(w_ptrs)
            w_up = tl.load(w_ptrs + I * D)
        else:
            x = tl.load(x_ptrs, mask=d + cols[None, :] < D, other=0.0)
            w_gate = tl.load(w_ptrs, mask=d + cols[:, None] < D, other=0.0)
            w_up = tl.load(w_ptrs + I * D, mask=d + cols[:, None] < D, other=0.0)
        gate = tl.dot(x, w_gate, gate, input_precision="ieee")
        up = tl.dot(x, w_up, up, input_precision="ieee")
    h = gate / (1.0 + tl.exp(-gate)) * up
    h_ptrs = h_ptr + pair[:, None] * I + rows[None, :]
    here = (tl.arange(0, BLOCK_T) < count)[:, None] & (rows < I)[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=here)


@triton.jit
def gate_up_expert_kernel(
    x_ptr,
    ids_ptr,
    w_ptr,
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
    w_ptr += expert.to(tl.int64) * (2 * I * D)
    if count == 0:
        return
    if count <= BLOCK_T:
        _gate_up_tile(x_ptr, w_ptr, h_ptr, pair, count, first, x_stride, D, I, K, BLOCK_T, BLOCK_I, BLOCK_D, STAGES)
    else:
        start = 0
        while start < count:
            some, _ = _pairs_of(ids_ptr, group, pairs, expert, start, BY_PAIR, 32, WIDE)
            # Half the depth, as the tile of tokens grows: registers and shared memory must not, for the rare case.
            _gate_up_tile(
                x_ptr,
                w_ptr,
                h_ptr,
                some,
                count - start,
                first,
                x_stride,
                D,
                I,
                K,
                WIDE,
                BLOCK_I,
                BLOCK_D // 2,
                STAGES,
            )
            start += WIDE


@triton.jit
def _down_tile(
    h_ptr,
    w_ptr,
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
    rows = first + tl.arange(0, BLOCK_D)
    cols = tl.arange(0, BLOCK_I)
    w_rows = tl.minimum(rows, D - 1)[None, :] * I
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i in tl.range(0, I, BLOCK_I, num_stages=STAGES):
        h_ptrs = h_ptr + pair[:, None] * I + i + cols[None, :]
        w_ptrs = w_ptr + w_rows + i + cols[:, None]
        if I % BLOCK_I == 0:
            acc = tl.dot(tl.load(h_ptrs), tl.load(w_ptrs), acc, input_precision="ieee")
        else:
            h = tl.load(h_ptrs, mask=i + cols[None, :] < I, other=0.0)
            w = tl.load(w_ptrs, mask=i + cols[:, None] < I, other=0.0)
            acc = tl.dot(h, w, acc, input_precision="ieee")
    here = (tl.arange(0, BLOCK_T) < count)[:, None] & (rows < D)[None, :]
    tl.store(y_ptr + pair[:, None] * D + rows[None, :], acc, mask=here)


@triton.jit
def down_expert_kernel(
    h_ptr,
    ids_ptr,
    w_ptr,
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
    w_ptr += expert.to(tl.int64) * (D * I)
    if PDL:
        gdc_wait()
    if count == 0:
        return
    if count <= BLOCK_T:
        _down_tile(h_ptr, w_ptr, y_ptr, pair, count, first, D, I, BLOCK_T, BLOCK_D, BLOCK_I, STAGES)
    else:
        start = 0
        while start < count:
            some, _ = _pairs_of(ids_ptr, group, pairs, expert, start, BY_PAIR, 32, WIDE)
            _down_tile(h_ptr, w_ptr, y_ptr, some, count - start, first, D, I, WIDE, BLOCK_D, BLOCK_I // 2, STAGES)
            start += WIDE


def experts_of_pairs(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    w_gate_up_E2ID: Tensor,
    w_down_EDI: Tensor,
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,
) -> Tensor:
    if len(x_TD) == 0:
        return torch.empty_like(x_TD)
    y_PD = run_down_pairs(run_gate_up_pairs(x_TD, ids_Tk, w_gate_up_E2ID, num_shared), ids_Tk, w_down_EDI)
    return weighted_sum(y_PD, weights_Tk, x_TD.dtype, residual_TD)


def experts_of_tiles(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    w_gate_up_E2ID: Tensor,
    w_down_EDI: Tensor,
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,
) -> Tensor:
    if len(x_TD) == 0:
        return torch.empty_like(x_TD)
    y_PD = run_down_experts(run_gate_up_experts(x_TD, ids_Tk, w_gate_up_E2ID), ids_Tk, w_down_EDI)
    return weighted_sum(y_PD, weights_Tk, x_TD.dtype, residual_TD)


def run_gate_up_pairs(
    x_TD: Tensor, ids_Tk: Tensor, w_E2ID: Tensor, num_shared: int, block: int = 2, warps: int = 4, depth: int = 512
) -> Tensor:
    (E, I2, D), (T, K) = w_E2ID.shape, ids_Tk.shape
    I = I2 // 2
    h_PI = torch.empty(T * K, I, dtype=x_TD.dtype, device=x_TD.device)
    gate_up_pair_kernel[(T * K * triton.cdiv(I, block),)](
        x_TD,
        ids_Tk,
        w_E2ID,
        h_PI,
        T * K,
        x_TD.stride(0),
        E=E,
        D=D,
        I=I,
        K=K,
        SHARED=num_shared,
        BLOCK_I=block,
        BLOCK_D=depth,
        num_warps=warps,
        **pdl_options(x_TD),
    )
    return h_PI


def run_down_pairs(
    h_PI: Tensor, ids_Tk: Tensor, w_EDI: Tensor, block: int = 16, warps: int = 4, depth: int = 256
) -> Tensor:
    _, D, I = w_EDI.shape
    P = ids_Tk.numel()
    y_PD = torch.empty(P, D, dtype=torch.float32, device=h_PI.device)
    down_pair_kernel[(P * triton.cdiv(D, block),)](
        h_PI,
        ids_Tk,
        w_EDI,
        y_PD,
        D=D,
        I=I,
        BLOCK_D=block,
        BLOCK_I=depth,
        num_warps=warps,
        **pdl_options(h_PI),
    )
    return y_PD


def _grouping(T: int, K: int, E: int) -> tuple[int, dict[str, int | bool]]:
    """Groups of a launch over experts, and the constants that go with them."""
    by_pair = T * K < E
    return (T * K if by_pair else E), {"BY_PAIR": by_pair, "BLOCK_P": min(256, max(16, triton.next_power_of_2(T * K)))}


def run_gate_up_experts(
    x_TD: Tensor,
    ids_Tk: Tensor,
    w_E2ID: Tensor,
    block: int = 64,
    depth: int = 128,
    stages: int = 3,
    warps: int = 4,
    rows: int = 16,
) -> Tensor:
    (E, I2, D), (T, K) = w_E2ID.shape, ids_Tk.shape
    I = I2 // 2
    h_PI = torch.empty(T * K, I, dtype=x_TD.dtype, device=x_TD.device)
    groups, grouping = _grouping(T, K, E)
    gate_up_expert_kernel[(groups * triton.cdiv(I, block),)](
        x_TD,
        ids_Tk,
        w_E2ID,
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
        **pdl_options(x_TD),
    )
    return h_PI


def run_down_experts(
    h_PI: Tensor,
    ids_Tk: Tensor,
    w_EDI: Tensor,
    block: int = 128,
    depth: int = 128,
    stages: int = 3,
    warps: int = 4,
    rows: int = 16,
) -> Tensor:
    (E, D, I), (T, K) = w_EDI.shape, ids_Tk.shape
    y_PD = torch.empty(T * K, D, dtype=torch.float32, device=h_PI.device)
    groups, grouping = _grouping(T, K, E)
    down_expert_kernel[(groups * triton.cdiv(D, block),)](
        h_PI,
        ids_Tk,
        w_EDI,
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
        **pdl_options(h_PI),
    )
    return y_PD
