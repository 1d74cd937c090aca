"""Experts for a batch of tokens: a program takes a block of rows of one expert for all tokens that chose it.

Weights in x's dtype, three launches: gate and up with SiLU, and down, find the pairs of an expert by scanning the ids
themselves, then comes the weighted sum. Weights in fp8, four: what bounds these, beside the memory, is the widening of
weights in registers, so a launch ahead brings x to fp16, and lists each expert's pairs while it is there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.moe.experts.triton.grouping import Lists, expert_of_group, list_pairs, pairs_of_group, scan_of
from thalweg.ops.moe.experts.triton.products import BLOCK, down_sums, gate_up_sums, silu_and_mul
from thalweg.ops.moe.experts.triton.weighted_sum import weighted_sum
from thalweg.ops.toolchain.triton_launch import pdl_options

TOKENS = 16  # of a tile
WIDE = tl.constexpr(64)  # of a tile without lists if more than TOKENS chose an expert
SMALL_BATCH = 128  # above, an expert's tokens are several tiles one after the other: finer blocks spread them


@triton.jit
def _gate_up_tile(
    x_ptr,
    x_scale_ptr,
    x_stride,
    w_ptr,
    s_ptr,
    h_ptr,
    pair,
    here,
    first,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h of the pairs that are `here`, from one expert's rows `first` and on."""
    rows = first + tl.arange(0, BLOCK_I)
    x_ptrs = x_ptr + (pair // K)[:, None] * x_stride
    w_ptrs = w_ptr + tl.minimum(rows, I - 1)[None, :] * D
    gate, up = gate_up_sums(x_ptrs, w_ptrs, s_ptr, D, I, BLOCK_D, STAGES, False)
    if x_scale_ptr is not None:
        scale = tl.load(x_scale_ptr + pair // K)[:, None]
        gate *= scale
        up *= scale
    h = silu_and_mul(gate, up).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + pair[:, None] * I + rows[None, :], h, mask=here[:, None] & (rows < I)[None, :])


@triton.jit
def gate_up_tile_kernel(
    x_ptr,
    x_scale_ptr,  # of x's rows if they are scaled fp16, or None
    ids_ptr,
    expert_ptr,  # these three: lists, or None
    count_ptr,
    list_ptr,
    w_ptr,  # [E, 2I, D]
    s_ptr,  # [E, 2 * blocks of I, blocks of D], or None
    h_ptr,  # [T * K, I]
    pairs,
    tokens,
    x_stride,
    E: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    BY_PAIR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,  # divides BLOCK if there are scales
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        # Only after the wait may "down" start: it reads ids or lists before its own, and they are complete here.
        gdc_wait()
        gdc_launch_dependents()
    blocks: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    first = (tl.program_id(0) % blocks) * BLOCK_I
    group = tl.program_id(0) // blocks
    if list_ptr is None:
        expert = expert_of_group(ids_ptr, group, pairs, E, BY_PAIR)
        pair, count = pairs_of_group(ids_ptr, group, pairs, expert, 0, BY_PAIR, BLOCK_P, BLOCK_T)
    else:
        count = tl.load(count_ptr + group)
        expert = tl.load(expert_ptr + group)
    w_ptr += expert.to(tl.int64) * (2 * I * D)
    if s_ptr is not None:
        blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
        s_ptr += (expert * (2 * blocks_i) + first // BLOCK) * ((D + BLOCK - 1) // BLOCK)
    operands = (x_ptr, x_scale_ptr, x_stride, w_ptr, s_ptr, h_ptr)
    start = 0
    if list_ptr is not None:
        while start < count:
            place = start + tl.arange(0, BLOCK_T)
            pair = tl.load(list_ptr + group * tokens + place, mask=place < count, other=0)
            _gate_up_tile(*operands, pair, place < count, first, D, I, K, BLOCK_I, BLOCK_D, STAGES)
            start += BLOCK_T
    else:
        if count == 0:
            return
        if count <= BLOCK_T:
            here = tl.arange(0, BLOCK_T) < count
            _gate_up_tile(*operands, pair, here, first, D, I, K, BLOCK_I, BLOCK_D, STAGES)
        else:
            while start < count:
                some, _ = pairs_of_group(ids_ptr, group, pairs, expert, start, BY_PAIR, 32, WIDE)
                here = tl.arange(0, WIDE) < count - start
                # Half the depth, as the tile of tokens grows: registers and shared memory must not, for the rare case.
                _gate_up_tile(*operands, some, here, first, D, I, K, BLOCK_I, BLOCK_D // 2, STAGES)
                start += WIDE


@triton.jit
def _down_tile(
    h_ptr,
    w_ptr,
    s_ptr,
    s_next,
    y_ptr,
    pair,
    here,
    first,
    D: tl.constexpr,
    I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y of the pairs that are `here`, from one expert's rows `first` and on."""
    rows = first + tl.arange(0, BLOCK_D)
    w_ptrs = w_ptr + tl.minimum(rows, D - 1)[None, :] * I
    h_ptrs = h_ptr + pair[:, None] * I
    y = down_sums(h_ptrs, w_ptrs, s_ptr, s_next, I, BLOCK_I, STAGES, False)
    tl.store(y_ptr + pair[:, None] * D + rows[None, :], y, mask=here[:, None] & (rows < D)[None, :])


@triton.jit
def down_tile_kernel(
    h_ptr,
    ids_ptr,
    expert_ptr,  # these three: lists, or None
    count_ptr,
    list_ptr,
    w_ptr,  # [E, D, I]
    s_ptr,  # [E, blocks of D, blocks of I], or None
    y_ptr,  # [T * K, D] fp32
    pairs,
    tokens,
    E: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    BY_PAIR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,  # divides BLOCK if there are scales, or is twice as much
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    first = (tl.program_id(0) % blocks) * BLOCK_D
    group = tl.program_id(0) // blocks
    # Ids and lists are complete: "gate_up" lets this kernel start only after its own wait for them. Not from L1, which
    # may hold what was there before.
    if list_ptr is None:
        expert = expert_of_group(ids_ptr, group, pairs, E, BY_PAIR)
        pair, count = pairs_of_group(ids_ptr, group, pairs, expert, 0, BY_PAIR, BLOCK_P, BLOCK_T)
    else:
        count = tl.load(count_ptr + group, cache_modifier=".cg")
        expert = tl.load(expert_ptr + group, cache_modifier=".cg")
    w_ptr += expert.to(tl.int64) * (D * I)
    s_next = 0
    if s_ptr is not None:
        blocks_d: tl.constexpr = (D + BLOCK - 1) // BLOCK
        blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
        row = first // BLOCK
        s_ptr += (expert * blocks_d + row) * blocks_i
        s_next = (tl.minimum(row + 1, blocks_d - 1) - row) * blocks_i
    operands = (h_ptr, w_ptr, s_ptr, s_next, y_ptr)
    if PDL:
        gdc_wait()
    start = 0
    if list_ptr is not None:
        while start < count:
            place = start + tl.arange(0, BLOCK_T)
            pair = tl.load(list_ptr + group * tokens + place, mask=place < count, other=0)
            _down_tile(*operands, pair, place < count, first, D, I, BLOCK_D, BLOCK_I, STAGES)
            start += BLOCK_T
    else:
        if count == 0:
            return
        if count <= BLOCK_T:
            here = tl.arange(0, BLOCK_T) < count
            _down_tile(*operands, pair, here, first, D, I, BLOCK_D, BLOCK_I, STAGES)
        else:
            while start < count:
                some, _ = pairs_of_group(ids_ptr, group, pairs, expert, start, BY_PAIR, 32, WIDE)
                here = tl.arange(0, WIDE) < count - start
                _down_tile(*operands, some, here, first, D, I, BLOCK_D, BLOCK_I // 2, STAGES)
                start += WIDE


class Tile(NamedTuple):
    """How a product is cut: rows of weights and columns at a time, stages of the pipeline, warps."""

    rows: int
    columns: int
    stages: int
    warps: int


def gate_up_tile(T: int, x_dtype: torch.dtype, scaled: bool) -> Tile:
    if not scaled:
        return Tile(64, 128, 3, 4)
    if x_dtype == torch.float32:  # no tensor cores: a small tile, for registers
        return Tile(16, BLOCK.value, 1, 4)
    return Tile(128, BLOCK.value, 4, 8) if T <= SMALL_BATCH else Tile(64, BLOCK.value, 4, 4)


def down_tile(T: int, h_dtype: torch.dtype, scaled: bool) -> Tile:
    if not scaled:
        return Tile(128, 128, 3, 4)
    if h_dtype == torch.float32:
        return Tile(16, BLOCK.value, 1, 4)
    return Tile(256, BLOCK.value, 4, 8) if T <= SMALL_BATCH else Tile(128, BLOCK.value, 3, 4)


class Grouping(NamedTuple):
    """How the programs of a product find their pairs."""

    ids_Tk: Tensor
    lists: Lists | None
    groups: int
    constants: dict[str, Any]


def grouping_of(ids_Tk: Tensor, experts: int, lists: Lists | None) -> Grouping:
    if lists is not None:
        return Grouping(ids_Tk, lists, len(lists.count_G), {"BY_PAIR": False, "BLOCK_P": 16})
    scan = scan_of(ids_Tk.numel(), experts, 256)
    return Grouping(ids_Tk, None, scan.groups, {"BY_PAIR": scan.by_pair, "BLOCK_P": scan.ids})


def experts_of_tiles(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,
) -> Tensor:
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if len(x_TD) == 0:
        return out_TD
    experts, lists, x_scale_T = len(down[0]), None, None
    h_PI = torch.empty(ids_Tk.numel(), down[0].shape[-1], dtype=x_TD.dtype, device=x_TD.device)
    if len(down) > 1:
        lists, x_TD, x_scale_T = list_pairs(x_TD, ids_Tk, experts)
    grouping = grouping_of(ids_Tk, experts, lists)
    run_gate_up(x_TD, x_scale_T, grouping, h_PI, *gate_up)
    return weighted_sum(run_down(h_PI, grouping, *down), weights_Tk, out_TD, residual_TD)


def run_gate_up(
    x_TD: Tensor,
    x_scale_T: Tensor | None,
    grouping: Grouping,
    h_PI: Tensor,
    w_E2ID: Tensor,
    scales: Tensor | None = None,
) -> None:
    """h [T * k, I] = silu(gate x) * up x of every pair."""
    (T, K), (E, I2, D) = grouping.ids_Tk.shape, w_E2ID.shape
    tile = gate_up_tile(T, x_TD.dtype, scales is not None)
    gate_up_tile_kernel[(grouping.groups * triton.cdiv(I2 // 2, tile.rows),)](
        x_TD,
        x_scale_T,
        grouping.ids_Tk,
        *(grouping.lists or (None, None, None)),
        w_E2ID,
        scales,
        h_PI,
        T * K,
        T,
        x_TD.stride(0),
        E=E,
        D=D,
        I=I2 // 2,
        K=K,
        **grouping.constants,
        BLOCK_T=TOKENS,
        BLOCK_I=tile.rows,
        BLOCK_D=tile.columns,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **pdl_options(x_TD),
    )


def run_down(h_PI: Tensor, grouping: Grouping, w_EDI: Tensor, scales: Tensor | None = None) -> Tensor:
    """y [T * k, D] fp32 = down h of every pair."""
    (T, K), (E, D, I) = grouping.ids_Tk.shape, w_EDI.shape
    tile = down_tile(T, h_PI.dtype, scales is not None)
    y_PD = torch.empty(T * K, D, dtype=torch.float32, device=h_PI.device)
    down_tile_kernel[(grouping.groups * triton.cdiv(D, tile.rows),)](
        h_PI,
        grouping.ids_Tk,
        *(grouping.lists or (None, None, None)),
        w_EDI,
        scales,
        y_PD,
        T * K,
        T,
        E=E,
        D=D,
        I=I,
        **grouping.constants,
        BLOCK_T=TOKENS,
        BLOCK_D=tile.rows,
        BLOCK_I=tile.columns,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **pdl_options(h_PI),
    )
    return y_PD
