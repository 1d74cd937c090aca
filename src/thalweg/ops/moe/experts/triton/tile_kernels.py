"""The kernels of `tiles`: a program takes a block of rows of one expert for all tokens that chose it, or of the own
expert for a tile of all tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.moe.experts.triton.grouping import expert_of_group, pairs_of_group
from thalweg.ops.moe.experts.triton.products import down_sums, gate_up_sums, h_width, store_h

WIDE = tl.constexpr(64)  # tokens of a tile without lists if more than BLOCK_T chose an expert


@triton.jit
def _gate_up_tile(
    x_ptr,
    x_scale_ptr,
    x_stride,
    w_ptr,
    s_ptr,
    h_ptr,
    expert,
    first,
    pair,
    here,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h of the pairs that are `here`, the places from `first` on, from one expert's weights."""
    x_ptrs = x_ptr + (pair // K)[:, None] * x_stride
    gate, up = gate_up_sums(x_ptrs, w_ptr, s_ptr, expert, first, D, I, BLOCK_I, BLOCK_D, STAGES, False)
    if x_scale_ptr is not None:
        scale = tl.load(x_scale_ptr + pair // K)[:, None]
        gate *= scale
        up *= scale
    store_h(h_ptr, gate, up, pair, here, first, w_ptr, I)


@triton.jit
def gate_up_tile_kernel(
    x_ptr,
    x_scale_ptr,  # of x's rows if they are scaled fp16, or None
    ids_ptr,
    expert_ptr,  # these three: lists, which FOUND are made here
    count_ptr,
    list_ptr,
    w_ptr,
    s_ptr,
    h_ptr,  # [T * K, h_width]
    own_x_ptr,  # these three: of the own expert, or None
    own_w_ptr,  # [2 * OWN, D]
    own_h_ptr,  # [T, OWN]
    pairs,
    tokens,
    x_stride,
    own_x_stride,
    own_programs,
    E: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    OWN: tl.constexpr,
    FOUND: tl.constexpr,
    BY_PAIR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    OWN_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    OWN_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        # Only after the wait may "down" start: it reads ids or lists before its own, and they are complete here.
        gdc_wait()
        gdc_launch_dependents()
    if own_w_ptr is not None:
        if tl.program_id(0) < own_programs:
            # Every token's, and first: its weights are the most.
            parts: tl.constexpr = (OWN + OWN_I - 1) // OWN_I
            token = tl.program_id(0) // parts * OWN_T + tl.arange(0, OWN_T)
            here = token < tokens
            token = tl.where(here, token, 0)
            first = tl.program_id(0) % parts * OWN_I
            own = (own_x_ptr, None, own_x_stride, own_w_ptr, None, own_h_ptr, tl.full([], 0, tl.int32))
            _gate_up_tile(*own, first, token, here, D, OWN, 1, OWN_I, OWN_D, STAGES)
            return
    blocks: tl.constexpr = (h_width(w_ptr.dtype.element_ty, I) + BLOCK_I - 1) // BLOCK_I
    program = tl.program_id(0)
    if own_w_ptr is not None:
        program -= own_programs
        tl.assume(program >= 0)
    first = (program % blocks) * BLOCK_I
    group = program // blocks
    places = tl.arange(0, BLOCK_T)
    if FOUND:
        expert = expert_of_group(ids_ptr, group, pairs, E, BY_PAIR)
        pair, count = pairs_of_group(ids_ptr, group, pairs, expert, 0, BY_PAIR, BLOCK_P, BLOCK_T)
        if first == 0:
            tl.store(count_ptr + group, count)
            tl.store(expert_ptr + group, expert)
            tl.store(list_ptr + group * tokens + places, pair, mask=places < count)
    else:
        count = tl.load(count_ptr + group)
        expert = tl.load(expert_ptr + group)
    operands = (x_ptr, x_scale_ptr, x_stride, w_ptr, s_ptr, h_ptr, expert, first)
    start = 0
    if FOUND:
        if count == 0:
            return
        if count <= BLOCK_T:
            _gate_up_tile(*operands, pair, places < count, D, I, K, BLOCK_I, BLOCK_D, STAGES)
        else:
            while start < count:
                some, _ = pairs_of_group(ids_ptr, group, pairs, expert, start, BY_PAIR, 32, WIDE)
                wide = tl.arange(0, WIDE)
                if first == 0:
                    tl.store(list_ptr + group * tokens + start + wide, some, mask=wide < count - start)
                # Half the depth, as the tile of tokens grows: registers and shared memory must not, for the rare case.
                _gate_up_tile(*operands, some, wide < count - start, D, I, K, BLOCK_I, BLOCK_D // 2, STAGES)
                start += WIDE
    else:
        while start < count:
            place = start + places
            pair = tl.load(list_ptr + group * tokens + place, mask=place < count, other=0)
            _gate_up_tile(*operands, pair, place < count, D, I, K, BLOCK_I, BLOCK_D, STAGES)
            start += BLOCK_T


@triton.jit
def _down_tile(
    h_ptr,
    w_ptr,
    s_ptr,
    y_ptr,
    expert,
    first,
    pair,
    here,
    D: tl.constexpr,
    I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y of the pairs that are `here`, the columns from `first` on, from one expert's weights."""
    h_ptrs = h_ptr + pair[:, None] * h_width(w_ptr.dtype.element_ty, I)
    y = down_sums(h_ptrs, w_ptr, s_ptr, expert, first, D, I, BLOCK_D, BLOCK_I, STAGES, False)
    rows = first + tl.arange(0, BLOCK_D)
    tl.store(y_ptr + pair[:, None] * D + rows[None, :], y, mask=here[:, None] & (rows < D)[None, :])


@triton.jit
def down_tile_kernel(
    h_ptr,
    expert_ptr,  # these three: lists
    count_ptr,
    list_ptr,
    w_ptr,
    s_ptr,
    y_ptr,  # [T * K, D] fp32
    own_h_ptr,  # these three: of the own expert, or None
    own_w_ptr,  # [D, OWN]
    own_y_ptr,  # [T, D] fp32
    tokens,
    own_programs,
    D: tl.constexpr,
    I: tl.constexpr,
    OWN: tl.constexpr,
    FOUND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    OWN_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    OWN_I: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    if own_w_ptr is not None:
        if tl.program_id(0) < own_programs:
            parts: tl.constexpr = (D + OWN_D - 1) // OWN_D
            token = tl.program_id(0) // parts * OWN_T + tl.arange(0, OWN_T)
            here = token < tokens
            token = tl.where(here, token, 0)
            first = tl.program_id(0) % parts * OWN_D
            if PDL:
                gdc_wait()
            own = (own_h_ptr, own_w_ptr, None, own_y_ptr, tl.full([], 0, tl.int32))
            _down_tile(*own, first, token, here, D, OWN, OWN_D, OWN_I, STAGES)
            return
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    if own_w_ptr is not None:
        program -= own_programs
        tl.assume(program >= 0)
    first = (program % blocks) * BLOCK_D
    group = program // blocks
    # If the lists are of a launch ahead of "gate_up" they are complete: that lets this kernel start only after its own
    # wait for them. Not from L1, which may hold what was there before.
    if FOUND and PDL:
        gdc_wait()
    count = tl.load(count_ptr + group, cache_modifier=".cg")
    expert = tl.load(expert_ptr + group, cache_modifier=".cg")
    operands = (h_ptr, w_ptr, s_ptr, y_ptr, expert, first)
    if not FOUND and PDL:
        gdc_wait()
    list_ptr += group * tokens
    start = 0
    if FOUND and count > BLOCK_T:
        while start < count:
            place = start + tl.arange(0, WIDE)
            pair = tl.load(list_ptr + place, mask=place < count, other=0, cache_modifier=".cg")
            _down_tile(*operands, pair, place < count, D, I, BLOCK_D, BLOCK_I // 2, STAGES)
            start += WIDE
    else:
        while start < count:
            place = start + tl.arange(0, BLOCK_T)
            pair = tl.load(list_ptr + place, mask=place < count, other=0, cache_modifier=".cg")
            _down_tile(*operands, pair, place < count, D, I, BLOCK_D, BLOCK_I, STAGES)
            start += BLOCK_T
