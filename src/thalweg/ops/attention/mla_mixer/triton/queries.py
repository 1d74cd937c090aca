"""Low-rank queries of up to 16 tokens into latent space in one launch: their projection, rotation and absorption.

A program takes a head: the rows of w_q and of w_uk that are its own, one after the other. What it reads first of both
it asks for before its wait, as far as L2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.attention.mla_mixer import LOW_RANK_ROWS
from thalweg.ops.attention.mla_rope.triton import cos_and_sin, turned
from thalweg.ops.toolchain.triton_dot import dot
from thalweg.ops.toolchain.triton_launch import pdl_options

WARPS, STAGES = 8, 4


@triton.jit
def _fetch(ptr, BYTES: tl.constexpr):
    """Ask for BYTES from ptr on to be brought into L2, at most 64 KiB at a time. One thread asks."""
    for i in tl.static_range(0, BYTES, 65536):
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .u32 t;
            mov.u32 t, %tid.x;
            setp.eq.u32 p, t, 0;
            @p cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [ptr.to(tl.int64) + i, tl.full([], min(65536, BYTES - i), tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["B"])
def queries_kernel(
    x_ptr,  # [B, Q]
    w_ptr,  # [H, K + P, Q]
    w_uk_ptr,  # [H, K, R]
    q_ptr,  # [B, H, R + P]
    positions_ptr,
    frequencies_ptr,
    B,
    x_stride,
    w_uk_stride_h,
    rope_scale,
    Q: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    ITEM: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
    h = tl.program_id(0)
    b = tl.arange(0, BLOCK_B)
    k = tl.arange(0, K)
    p = tl.arange(0, P)
    c = tl.arange(0, BLOCK_Q)
    w_ptr += h.to(tl.int64) * ((K + P) * Q)
    w_uk_ptr += h * w_uk_stride_h
    if PDL:
        gdc_launch_dependents()
        _fetch(w_ptr, (K + P) * Q * ITEM)
        _fetch(w_uk_ptr, K * R * ITEM)
    position_B = tl.load(positions_ptr + b, mask=b < B, other=0)
    cos_BF, sin_BF = cos_and_sin(position_B, frequencies_ptr, rope_scale, P, P)
    if PDL:
        gdc_wait()
    q_KB = tl.zeros([K, BLOCK_B], tl.float32)
    q_PB = tl.zeros([P, BLOCK_B], tl.float32)
    for first in tl.range(0, Q, BLOCK_Q, num_stages=STAGES):
        x_CB = tl.load(x_ptr + b[None, :] * x_stride + first + c[:, None], mask=(b < B)[None, :], other=0.0)
        w_KC = tl.load(w_ptr + k[:, None] * Q + first + c[None, :])
        w_PC = tl.load(w_ptr + (K + p)[:, None] * Q + first + c[None, :])
        q_KB += dot(w_KC, x_CB)
        q_PB += dot(w_PC, x_CB)
    out_ptrs = q_ptr + (b[:, None].to(tl.int64) * H + h) * (R + P)
    # Rounded where the projection by itself rounds.
    q_KB = q_KB.to(x_ptr.dtype.element_ty)
    for r in tl.range(0, R, BLOCK_R, num_stages=2):
        r_slice = r + tl.arange(0, BLOCK_R)
        w_RK = tl.load(w_uk_ptr + k[None, :] * R + r_slice[:, None])
        out_RB = dot(w_RK, q_KB)
        tl.store(out_ptrs + r_slice[None, :], tl.trans(out_RB).to(q_ptr.dtype.element_ty), mask=(b < B)[:, None])
    q_BP = turned(tl.trans(q_PB).to(x_ptr.dtype.element_ty), cos_BF, sin_BF, BLOCK_B, P)
    tl.store(out_ptrs + R + p[None, :], q_BP.to(q_ptr.dtype.element_ty), mask=(b < B)[:, None])


def latent_queries(
    q_BQ: Tensor, w_OQ: Tensor, w_uk_HKR: Tensor, positions_B: Tensor, frequencies_F: Tensor, rope_scale: float
) -> Tensor:
    """[B, H, R + P] of at most LOW_RANK_ROWS rows of normed low-rank queries."""
    (B, Q), (H, K, R), P = q_BQ.shape, w_uk_HKR.shape, 2 * len(frequencies_F)
    q_BHC = q_BQ.new_empty(B, H, R + P)
    queries_kernel[(H,)](
        q_BQ,
        w_OQ,
        w_uk_HKR,
        q_BHC,
        positions_B,
        frequencies_F,
        B,
        q_BQ.stride(0),
        w_uk_HKR.stride(0),
        rope_scale,
        Q=Q,
        H=H,
        K=K,
        R=R,
        P=P,
        BLOCK_B=LOW_RANK_ROWS,
        BLOCK_Q=min(128, Q & -Q),
        BLOCK_R=min(R, 128),
        STAGES=STAGES,
        num_warps=WARPS,
        **pdl_options(q_BQ),
    )
    return q_BHC
