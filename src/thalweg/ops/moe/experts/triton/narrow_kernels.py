"""The kernels of `narrow`: gate and up, and down, of experts in fp8 for rows in fp8."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.moe.experts.triton.products import silu_and_mul
from thalweg.ops.products.triton import LARGEST, SMALLEST
from thalweg.ops.toolchain.triton_dot import dot
from thalweg.quant.blocks import BLOCK as _BLOCK

BLOCK = tl.constexpr(_BLOCK)
TOKENS = tl.constexpr(16)  # of a tile


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
