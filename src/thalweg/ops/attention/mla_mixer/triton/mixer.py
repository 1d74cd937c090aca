"""Decode of latent attention as three kernels, as the mixer of a layer without positions or for rotated queries.

1. `_absorb`: queries into latent space, a program per head and slice of the latent. In the mixer some programs besides
   norm the new latents and write them to the blocks; otherwise further ones rotate queries.
2. `_attend`: a program per sequence, split of its context and 32 heads. Scores are computed transposed, [tokens,
   heads], so that a tile of 64 tokens fills the matrix unit's rows however few heads there are, and one tile in shared
   memory serves as keys and as values.
3. `_combine`: w_uv times the results of all splits of some sequences, a product per head; the weighted sum over a
   sequence's splits comes after it, where little is left to sum.

Module gluon has faster forms of the last two, for blocks of whole tiles; those here take any block size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.attention.mla_rope.triton import rotate_heads
from thalweg.ops.toolchain.triton_dot import dot
from thalweg.ops.toolchain.triton_launch import pdl_options
from thalweg.ops.toolchain.triton_support import multiprocessors

BLOCK_N = 64  # tokens per tile
LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["B"])
def _absorb(
    x_ptr,
    w_uk_ptr,
    q_ptr,
    norm_weight_ptr,
    blocks_ptr,
    block_rows_ptr,
    positions_ptr,
    frequencies_ptr,
    B,
    x_stride,
    w_stride_h,
    eps,
    rope_scale,
    H: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    ROTATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program for a head and a slice of the latent. ROTATED: x has queries alone, whose shared parts further programs
    rotate, one for each token; otherwise it has the new latents as well."""
    slices: tl.constexpr = R // BLOCK_R
    pid = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
    if ROTATED:
        if pid >= H * slices:
            token = tl.minimum(tl.program_id(1) * BLOCK_B + pid - H * slices, B - 1).to(tl.int64)
            rotate_heads(
                x_ptr + token * x_stride + K,
                q_ptr + token * (H * (R + P)) + R,
                positions_ptr + token,
                frequencies_ptr,
                K + P,
                R + P,
                rope_scale,
                H,
                P,
                triton.next_power_of_2(H),
                P,
                PDL,
            )
            return
    h = pid // slices
    k = tl.arange(0, K)
    p = tl.arange(0, P)
    r = tl.arange(0, R)
    r_slice = pid % slices * BLOCK_R + tl.arange(0, BLOCK_R)
    b = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    b_mask = b[:, None] < B
    q_row_ptrs = x_ptr + b[:, None] * x_stride + h * (K + P)
    out_ptrs = q_ptr + (b[:, None] * H + h) * (R + P)
    w_KR = tl.load(w_uk_ptr + h * w_stride_h + k[:, None] * R + r_slice[None, :])
    if not ROTATED:
        norm_weight_R = tl.load(norm_weight_ptr + r).to(tl.float32)
    if PDL:
        gdc_wait()
    if BLOCK_B > 1:
        q_BK = tl.load(q_row_ptrs + k[None, :], mask=b_mask, other=0.0)
    if not ROTATED:
        shared_mask = b_mask & (pid % slices == 0)
        q_BP = tl.load(q_row_ptrs + K + p[None, :], mask=shared_mask, other=0.0)
        g = tl.arange(0, BLOCK_G)
        row_G = tl.program_id(1) * BLOCK_B + pid * BLOCK_G + g
        own_G = (pid * BLOCK_G + g < BLOCK_B) & (row_G < B)
        c_ptrs = x_ptr + row_G.to(tl.int64)[:, None] * x_stride + H * (K + P)
        c_GR = tl.load(c_ptrs + r[None, :], mask=own_G[:, None], other=0.0).to(tl.float32)
        shared_GP = tl.load(c_ptrs + R + p[None, :], mask=own_G[:, None], other=0.0)
        block_row_G = tl.load(block_rows_ptr + row_G, mask=own_G, other=0)
    if BLOCK_B == 1:
        # No product of the matrix unit, whose operands would stand in shared memory: programs find room beside those of
        # the projection ahead, and load w_uk while it ends.
        q_K = tl.load(x_ptr + tl.program_id(1).to(tl.int64) * x_stride + h * (K + P) + k)
        out_BR = tl.sum(q_K[:, None].to(tl.float32) * w_KR.to(tl.float32), 0)[None, :]
    else:
        out_BR = dot(q_BK, w_KR)
    tl.store(out_ptrs + r_slice[None, :], out_BR.to(q_ptr.dtype.element_ty), mask=b_mask)
    if not ROTATED:
        tl.store(out_ptrs + R + p[None, :], q_BP, mask=shared_mask)
        c_GR = c_GR * tl.rsqrt(tl.sum(c_GR * c_GR, 1) / R + eps)[:, None] * norm_weight_R[None, :]
        block_ptrs = blocks_ptr + block_row_G[:, None] * (R + P)
        tl.store(block_ptrs + r[None, :], c_GR.to(blocks_ptr.dtype.element_ty), mask=own_G[:, None])
        tl.store(block_ptrs + R + p[None, :], shared_GP.to(blocks_ptr.dtype.element_ty), mask=own_G[:, None])


@triton.jit
def _prefetch_tile(table_ptr, base_ptr, BLOCK_BYTES: tl.constexpr, TILE_BYTES: tl.constexpr):
    """Ask for the tile at base_ptr + block * BLOCK_BYTES to be brought into L2, with the block in table_ptr[0].

    One thread looks the block up and asks; the others hold no registers for it.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 t;
        .reg .u64 a;
        mov.u32 t, %tid.x;
        setp.eq.u32 p, t, 0;
        @p ld.global.u32 t, [$1];
        @p mad.wide.u32 a, t, $3, $2;
        @p cp.async.bulk.prefetch.L2.global [a], $4;
        mov.u32 $0, 0;
        }""",
        "=r,l,l,r,r",
        [
            table_ptr.to(tl.int64),
            base_ptr.to(tl.int64),
            tl.full([], BLOCK_BYTES, tl.int32),
            tl.full([], TILE_BYTES, tl.int32),
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["table_stride"])
def _attend(
    q_ptr,
    blocks_ptr,
    tables_ptr,
    lens_ptr,
    part_ptr,
    stats_ptr,
    table_stride,
    scale_log2,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    C: tl.constexpr = R + P
    ITEM: tl.constexpr = blocks_ptr.dtype.element_ty.primitive_bitwidth // 8
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    b = tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
    length = tl.load(lens_ptr + b)
    span = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    start = split * span
    end = tl.minimum(start + span, length)
    table_ptr = tables_ptr + b * table_stride
    last = tl.maximum(end - 1, 0) // BLOCK_N * BLOCK_N
    if PDL:
        if BLOCK_SIZE % BLOCK_N == 0:
            for j in tl.static_range(2):
                ahead = tl.minimum(start + j * BLOCK_N, last)
                _prefetch_tile(
                    table_ptr + ahead // BLOCK_SIZE,
                    blocks_ptr + ahead % BLOCK_SIZE * C,
                    BLOCK_SIZE * C * ITEM,
                    BLOCK_N * C * ITEM,
                )
        gdc_wait()

    h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    r = tl.arange(0, R)
    p = tl.arange(0, P)
    i = tl.arange(0, BLOCK_N)
    h_mask = h[:, None] < H
    q_ptrs = q_ptr + (b * H + h[:, None]) * C
    q_HR = tl.load(q_ptrs + r[None, :], mask=h_mask, other=0.0)
    q_HP = tl.load(q_ptrs + R + p[None, :], mask=h_mask, other=0.0)
    m_H = tl.full([BLOCK_H], float("-inf"), tl.float32)
    l_H = tl.zeros([BLOCK_H], tl.float32)
    acc_RH = tl.zeros([R, BLOCK_H], tl.float32)
    for first in tl.range(start, end, BLOCK_N, num_stages=2):
        if PDL and BLOCK_SIZE % BLOCK_N == 0:
            # Shared memory holds no third tile, so the tile after the next is fetched as far as L2.
            ahead = tl.minimum(first + 2 * BLOCK_N, last)
            _prefetch_tile(
                table_ptr + ahead // BLOCK_SIZE,
                blocks_ptr + ahead % BLOCK_SIZE * C,
                BLOCK_SIZE * C * ITEM,
                BLOCK_N * C * ITEM,
            )
        seen = first + i < end
        if BLOCK_SIZE % BLOCK_N == 0:
            block = tl.load(table_ptr + first // BLOCK_SIZE).to(tl.int64)
            row_ptrs = blocks_ptr + (block * BLOCK_SIZE + first % BLOCK_SIZE) * C + i[:, None] * C
        else:
            block_of_N = tl.load(table_ptr + (first + i) // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
            row_ptrs = blocks_ptr + (block_of_N * BLOCK_SIZE + (first + i) % BLOCK_SIZE)[:, None] * C
        # Zeros where nothing was written: a stale row may hold NaN, and 0 * NaN is NaN.
        kv_NR = tl.load(row_ptrs + r[None, :], mask=seen[:, None], other=0.0)
        k_NP = tl.load(row_ptrs + R + p[None, :], mask=seen[:, None], other=0.0)
        scores_NH = dot(kv_NR, tl.trans(q_HR)) + dot(k_NP, tl.trans(q_HP))
        scores_NH = tl.where(seen[:, None], scores_NH * scale_log2, float("-inf"))
        new_m_H = tl.maximum(m_H, tl.max(scores_NH, 0))
        p_NH = tl.exp2(scores_NH - new_m_H[None, :])
        keep_H = tl.exp2(m_H - new_m_H)
        l_H = l_H * keep_H + tl.sum(p_NH, 0)
        acc_RH = acc_RH * keep_H[None, :] + dot(tl.trans(kv_NR), p_NH.to(kv_NR.dtype))
        m_H = new_m_H
    part_row = (b * splits + split) * H
    part_ptrs = part_ptr + (part_row + h[None, :]) * R + r[:, None]
    # Splits past the sequence's end have nothing to tell.
    mask = (h < H) & (start < end)
    tl.store(part_ptrs, acc_RH.to(part_ptr.dtype.element_ty), mask=mask[None, :])
    tl.store(stats_ptr + 2 * part_row + h, m_H, mask=mask)
    tl.store(stats_ptr + 2 * part_row + H + h, l_H, mask=mask)


@triton.jit(do_not_specialize=["B", "splits"])
def _combine(
    part_ptr,
    stats_ptr,
    lens_ptr,
    w_uv_ptr,
    out_ptr,
    B,
    splits,
    w_stride_h,
    H: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    slices: tl.constexpr = V // BLOCK_V
    h = tl.program_id(0) // slices
    v = tl.program_id(0) % slices * BLOCK_V + tl.arange(0, BLOCK_V)
    r = tl.arange(0, R)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    s = tl.arange(0, BLOCK_S)
    if PDL:
        gdc_launch_dependents()
    w_VR = tl.load(w_uv_ptr + h * w_stride_h + v[:, None] * R + r[None, :])
    tiles_B = tl.cdiv(tl.load(lens_ptr + b, mask=b < B, other=0), BLOCK_N)
    span_B = tl.maximum(tl.cdiv(tiles_B, splits), 1)
    used_BS = s[None, :] * span_B[:, None] < tiles_B[:, None]
    part_BS = b[:, None].to(tl.int64) * splits + s[None, :]
    part_ptrs = part_ptr + (tl.reshape(part_BS, [BLOCK_B * BLOCK_S, 1]) * H + h) * R + r[None, :]
    used = tl.reshape(used_BS, [BLOCK_B * BLOCK_S, 1])
    stats_ptrs = stats_ptr + part_BS * (2 * H) + h
    if PDL:
        gdc_wait()
    part = tl.load(part_ptrs, mask=used, other=0.0)
    m_BS = tl.load(stats_ptrs, mask=used_BS, other=float("-inf"))
    l_BS = tl.load(stats_ptrs + H, mask=used_BS, other=0.0)
    # A finite fill for sequences without tokens, whose weights come out as zeros.
    weight_BS = tl.exp2(m_BS - tl.maximum(tl.max(m_BS, 1), -1e30)[:, None])
    weight_BS = weight_BS / tl.maximum(tl.sum(weight_BS * l_BS, 1), 1e-30)[:, None]
    # w_uv first, the weighted sum over splits after it: products are cheap, and their results few.
    out_VBS = tl.reshape(dot(w_VR, tl.trans(part)), [BLOCK_V, BLOCK_B, BLOCK_S])
    out_VB = tl.sum(out_VBS * weight_BS[None, :, :], 2)
    out_ptrs = out_ptr + (b[None, :].to(tl.int64) * H + h) * V + v[:, None]
    tl.store(out_ptrs, out_VB.to(out_ptr.dtype.element_ty), mask=b[None, :] < B)


def best_splits(B: int, processors: int) -> int:
    """Parts, at most 128, to split each context into: the fewest that a model of `attend` finds quickest.

    Programs run in waves, one on a multiprocessor. Measured on an H200: three quarters of them take all of the
    bandwidth, and a wave costs its start and its end besides, as much as four tiles. Lengths are on the device, so that
    a long context, of 128 tiles, stands for all.
    """

    def cost(splits: int) -> float:
        full, rest = divmod(B * splits, processors)
        last = max(0.75, rest / processors) if rest else 0.0
        return -(-128 // splits) * (full + last) + 4 * (full + (rest > 0))

    return min(range(1, 129), key=cost)


@dataclass(frozen=True, slots=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    constants: dict[str, int]
    num_warps: int

    def __call__(self, *args: Any, **constants: Any) -> None:
        self.kernel[self.grid](*args, **self.constants, **constants, num_warps=self.num_warps)


@cache
def launches(B: int, H: int, R: int, V: int, processors: int, rotated: bool = False) -> tuple[Launch, Launch, Launch]:
    """The three launches of this module's kernels for B sequences: grids, tiles and warps."""
    # Rows of a matrix unit's tile, or a row by itself.
    block_b = 1 if rotated and B == 1 else max(16, min(64, triton.next_power_of_2(B)))
    tile = {"BLOCK_B": block_b, "BLOCK_R": min(R, 128), "ROTATED": rotated}
    programs = H * (R // tile["BLOCK_R"])
    tile["BLOCK_G"] = triton.next_power_of_2(triton.cdiv(block_b, programs))  # latents that a program norms
    grid = (programs + (min(B, block_b) if rotated else 0), triton.cdiv(B, block_b))
    absorb = Launch(_absorb, grid, tile, 4)
    tile = {"BLOCK_H": max(16, min(32, triton.next_power_of_2(H))), "BLOCK_N": BLOCK_N}
    groups = triton.cdiv(H, tile["BLOCK_H"])  # each reads the context
    splits = best_splits(B * groups, processors)
    attend = Launch(_attend, (splits, B, groups), tile, 4)
    block_s = triton.next_power_of_2(splits)
    block_v, warps = (min(V, 128), 8) if block_s <= 64 else (min(V, 64), 4)  # to fit beside the parts
    tile = {"BLOCK_S": block_s, "BLOCK_N": BLOCK_N, "BLOCK_B": max(1, 64 // block_s), "BLOCK_V": block_v}
    combine = Launch(_combine, (H * (V // block_v), triton.cdiv(B, tile["BLOCK_B"])), tile, warps)
    return absorb, attend, combine


def run_absorb(
    absorb: Launch,
    x_BX: Tensor,
    w_uk_HKR: Tensor,
    blocks_MSC: Tensor,
    *,
    kv_norm_weight_R: Tensor | None = None,
    block_rows_B: Tensor | None = None,
    eps: float = 0.0,
    positions_B: Tensor | None = None,
    frequencies_F: Tensor | None = None,
    rope_scale: float = 1.0,
) -> Tensor:
    """Queries in latent space [B, H, R + P], rotated if there are positions. Otherwise x has new latents besides, which
    are in their blocks afterwards."""
    B, (H, K, R), P = x_BX.shape[0], w_uk_HKR.shape, blocks_MSC.shape[2] - w_uk_HKR.shape[2]
    q_BHC = x_BX.new_empty(B, H, R + P)
    absorb(
        x_BX,
        w_uk_HKR,
        q_BHC,
        kv_norm_weight_R,
        None if block_rows_B is None else blocks_MSC,
        block_rows_B,
        positions_B,
        frequencies_F,
        B,
        x_BX.stride(0),
        w_uk_HKR.stride(0),
        eps,
        rope_scale,
        H=H,
        K=K,
        R=R,
        P=P,
        **pdl_options(x_BX),
    )
    return q_BHC


def run_attention(
    attend: Launch,
    combine: Launch,
    q_BHC: Tensor,
    blocks_MSC: Tensor,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
    w_uv_HVR: Tensor,
    scale: float,
) -> Tensor:
    """o_BO of absorbed queries."""
    (B, H, C), (_, V, R) = q_BHC.shape, w_uv_HVR.shape
    o_BO = q_BHC.new_empty(B, H * V)
    splits, pdl = attend.grid[0], pdl_options(q_BHC)
    part_BSHR = q_BHC.new_empty(B, splits, H, R)
    stats_BS2H = q_BHC.new_empty(B, splits, 2, H, dtype=torch.float32)  # maximum and sum of each split's weights
    attend(
        q_BHC,
        blocks_MSC,
        block_tables_BN,
        context_lens_B,
        part_BSHR,
        stats_BS2H,
        block_tables_BN.stride(0),
        scale * LOG2_E,
        H=H,
        R=R,
        P=C - R,
        BLOCK_SIZE=blocks_MSC.shape[1],
        **pdl,
    )
    combine(
        part_BSHR,
        stats_BS2H,
        context_lens_B,
        w_uv_HVR,
        o_BO,
        B,
        splits,
        w_uv_HVR.stride(0),
        H=H,
        R=R,
        V=V,
        **pdl,
    )
    return o_BO


def mla_mixer_decode(
    proj_BX: Tensor,
    *,
    kv_norm_weight_R: Tensor,
    w_uk_HKR: Tensor,
    w_uv_HVR: Tensor,
    blocks_MSC: Tensor,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
    block_rows_B: Tensor,
    scale: float,
    eps: float,
) -> Tensor:
    B, (H, V, R) = proj_BX.shape[0], w_uv_HVR.shape
    if B == 0:
        return proj_BX.new_empty(B, H * V)
    absorb, *attention = launches(B, H, R, V, multiprocessors(proj_BX.device))
    new = dict(kv_norm_weight_R=kv_norm_weight_R, block_rows_B=block_rows_B, eps=eps)
    q_BHC = run_absorb(absorb, proj_BX, w_uk_HKR, blocks_MSC, **new)
    return run_attention(*attention, q_BHC, blocks_MSC, block_tables_BN, context_lens_B, w_uv_HVR, scale)


def mla_decode(
    q_BO: Tensor,
    *,
    positions_B: Tensor,
    frequencies_F: Tensor,
    rope_scale: float,
    w_uk_HKR: Tensor,
    w_uv_HVR: Tensor,
    blocks_MSC: Tensor,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
    scale: float,
) -> Tensor:
    B, (H, V, R) = q_BO.shape[0], w_uv_HVR.shape
    if B == 0:
        return q_BO.new_empty(B, H * V)
    absorb, *attention = launches(B, H, R, V, multiprocessors(q_BO.device), rotated=True)
    rotation = dict(positions_B=positions_B, frequencies_F=frequencies_F, rope_scale=rope_scale)
    q_BHC = run_absorb(absorb, q_BO, w_uk_HKR, blocks_MSC, **rotation)
    return run_attention(*attention, q_BHC, blocks_MSC, block_tables_BN, context_lens_B, w_uv_HVR, scale)
