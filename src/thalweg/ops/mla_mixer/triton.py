"""The decode mixer of an MLA layer as three Triton kernels.

1. `_absorb`: queries into latent space, a program per head and slice of the latent; beside them, a program per
   sequence norms its new latent and writes it to the pages.
2. `_attend`: a program per sequence and split of its context. Scores are computed transposed, [tokens, heads], so that
   a tile of 64 tokens fills the matrix unit's rows whatever the number of heads, and one tile in shared memory serves
   as keys and as values.
3. `_combine`: the splits' results, weighted, and w_uv, a program per head and slice of its values.
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

from thalweg.ops.triton_launch import pdl_options
from thalweg.ops.triton_support import multiprocessors

BLOCK_N = 64  # tokens per tile
LOG2_E = 1.4426950408889634
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b):
    """a @ b in fp32. The interpreter's bf16 product is wrong, so it gets fp32 operands."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _absorb(
    proj_ptr,
    norm_weight_ptr,
    w_uk_ptr,
    pages_ptr,
    page_rows_ptr,
    q_latent_ptr,
    B,
    proj_stride,
    w_stride_h,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    pid = tl.program_id(0)
    slices: tl.constexpr = R // BLOCK_R
    if PDL:
        gdc_launch_dependents()
    if pid < H * slices:
        h = pid // slices
        k = tl.arange(0, K)
        r_slice = pid % slices * BLOCK_R + tl.arange(0, BLOCK_R)
        w_KR = tl.load(w_uk_ptr + h * w_stride_h + k[:, None] * R + r_slice[None, :])
        b = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
        if PDL:
            gdc_wait()
        q_BK = tl.load(proj_ptr + b[:, None] * proj_stride + h * (K + P) + k[None, :], mask=b[:, None] < B, other=0.0)
        out = _dot(q_BK, w_KR)
        out_ptrs = q_latent_ptr + (b[:, None] * H + h) * R + r_slice[None, :]
        tl.store(out_ptrs, out.to(q_latent_ptr.dtype.element_ty), mask=b[:, None] < B)
    else:
        row = tl.program_id(1) * BLOCK_B + pid - H * slices
        r = tl.arange(0, R)
        p = tl.arange(0, P)
        weight = tl.load(norm_weight_ptr + r).to(tl.float32)
        if PDL:
            gdc_wait()
        if row < B:
            c_ptr = proj_ptr + row.to(tl.int64) * proj_stride + H * (K + P)
            c = tl.load(c_ptr + r).to(tl.float32)
            c = c * tl.rsqrt(tl.sum(c * c, 0) / R + eps) * weight
            page_ptr = pages_ptr + tl.load(page_rows_ptr + row) * (R + P)
            tl.store(page_ptr + r, c.to(pages_ptr.dtype.element_ty))
            tl.store(page_ptr + R + p, tl.load(c_ptr + R + p).to(pages_ptr.dtype.element_ty))


@triton.jit
def _tile(pages_ptr, page, token, end, r, p, PAGE: tl.constexpr):
    """Latents and shared key parts of a tile of tokens, whose pages are given.

    Zeros where nothing was written: a stale row may hold NaN, and 0 * NaN is NaN.
    """
    row_ptrs = pages_ptr + (page.to(tl.int64) * PAGE + token % PAGE)[:, None] * (r.shape[0] + p.shape[0])
    seen = (token < end)[:, None]
    kv_NR = tl.load(row_ptrs + r[None, :], mask=seen, other=0.0)
    return kv_NR, tl.load(row_ptrs + r.shape[0] + p[None, :], mask=seen, other=0.0)


@triton.jit
def _attend(
    proj_ptr,
    q_latent_ptr,
    pages_ptr,
    tables_ptr,
    lens_ptr,
    part_ptr,
    lse_ptr,
    proj_stride,
    table_stride,
    scale_log2,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    b = tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(lens_ptr + b)
    span = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    start = split * span
    end = tl.minimum(start + span, length)
    h = tl.arange(0, BLOCK_H)
    r = tl.arange(0, R)
    p = tl.arange(0, P)
    i = tl.arange(0, BLOCK_N)
    h_mask = h[:, None] < H
    q_HR = tl.load(q_latent_ptr + (b * H + h[:, None]) * R + r[None, :], mask=h_mask, other=0.0)
    q_HP = tl.load(proj_ptr + b * proj_stride + h[:, None] * (K + P) + K + p[None, :], mask=h_mask, other=0.0)
    m_H = tl.full([BLOCK_H], float("-inf"), tl.float32)
    l_H = tl.zeros([BLOCK_H], tl.float32)
    acc_RH = tl.zeros([R, BLOCK_H], tl.float32)
    table_ptr = tables_ptr + b * table_stride
    token = start + i
    page = tl.load(table_ptr + token // PAGE, mask=token < end, other=0)
    page_next = tl.load(table_ptr + (token + BLOCK_N) // PAGE, mask=token + BLOCK_N < end, other=0)
    kv_NR, k_NP = _tile(pages_ptr, page, token, end, r, p, PAGE)
    for first in range(start, end, BLOCK_N):
        token = first + i
        # The next tile is on its way while this one is worked on, and the page after it is looked up.
        kv_next_NR, k_next_NP = _tile(pages_ptr, page_next, token + BLOCK_N, end, r, p, PAGE)
        page_next = tl.load(table_ptr + (token + 2 * BLOCK_N) // PAGE, mask=token + 2 * BLOCK_N < end, other=0)
        scores_NH = _dot(kv_NR, tl.trans(q_HR)) + _dot(k_NP, tl.trans(q_HP))
        scores_NH = tl.where((token < end)[:, None], scores_NH * scale_log2, float("-inf"))
        new_m_H = tl.maximum(m_H, tl.max(scores_NH, 0))
        p_NH = tl.exp2(scores_NH - new_m_H[None, :])
        keep_H = tl.exp2(m_H - new_m_H)
        l_H = l_H * keep_H + tl.sum(p_NH, 0)
        acc_RH = acc_RH * keep_H[None, :] + _dot(tl.trans(kv_NR), p_NH.to(kv_NR.dtype))
        m_H = new_m_H
        kv_NR, k_NP = kv_next_NR, k_next_NP
    part_row = (b * splits + split) * H
    part_ptrs = part_ptr + (part_row + h[None, :]) * R + r[:, None]
    # Splits past the sequence's end have nothing to tell.
    mask = (h < H) & (start < end)
    tl.store(part_ptrs, (acc_RH / l_H[None, :]).to(part_ptr.dtype.element_ty), mask=mask[None, :])
    tl.store(lse_ptr + part_row + h, m_H + tl.log2(l_H), mask=mask)


@triton.jit
def _combine(
    part_ptr,
    lse_ptr,
    lens_ptr,
    w_uv_ptr,
    out_ptr,
    B,
    w_stride_h,
    H: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    slices: tl.constexpr = V // BLOCK_V
    h = tl.program_id(0) // slices
    v = tl.program_id(0) % slices * BLOCK_V + tl.arange(0, BLOCK_V)
    r = tl.arange(0, BLOCK_R)
    s = tl.arange(0, BLOCK_S)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_mask = b < B
    w_ptrs = w_uv_ptr + h * w_stride_h + v[:, None] * R + r[None, :]
    if PDL:
        gdc_launch_dependents()
    w_VR = tl.load(w_ptrs)
    if PDL:
        gdc_wait()
    tiles_B = tl.cdiv(tl.load(lens_ptr + b, mask=b_mask, other=0), BLOCK_N)
    span_B = tl.maximum(tl.cdiv(tiles_B, SPLITS), 1)
    used_BS = s[None, :] * span_B[:, None] < tiles_B[:, None]
    row_BS = (b[:, None].to(tl.int64) * SPLITS + s[None, :]) * H + h
    lse_BS = tl.load(lse_ptr + row_BS, mask=used_BS, other=float("-inf"))
    # A finite fill for sequences without tokens, whose weights come out as zeros.
    weight_BS = tl.exp2(lse_BS - tl.maximum(tl.max(lse_BS, 1), -1e30)[:, None])
    weight_BS = weight_BS / tl.maximum(tl.sum(weight_BS, 1), 1e-30)[:, None]
    part_ptrs = part_ptr + row_BS[:, :, None] * R + r[None, None, :]
    acc_BV = tl.zeros([BLOCK_B, BLOCK_V], tl.float32)
    for first in tl.static_range(0, R, BLOCK_R):
        if first > 0:
            w_VR = tl.load(w_ptrs + first)
        part_BSR = tl.load(part_ptrs + first, mask=used_BS[:, :, None], other=0.0).to(tl.float32)
        o_BR = tl.sum(part_BSR * weight_BS[:, :, None], 1)
        if BLOCK_B == 1:
            acc_BV += tl.sum(w_VR.to(tl.float32) * o_BR, 1)[None, :]
        else:
            acc_BV += _dot(o_BR.to(w_VR.dtype), tl.trans(w_VR))
    out_ptrs = out_ptr + (b[:, None].to(tl.int64) * H + h) * V + v[None, :]
    tl.store(out_ptrs, acc_BV.to(out_ptr.dtype.element_ty), mask=b_mask[:, None])


def _splits(B: int, processors: int) -> int:
    """Parts to split each context into, so that all programs together fill whole waves of multiprocessors."""
    for waves in range(1, 5):
        programs = waves * processors
        if programs // B * B >= 0.9 * programs:
            break
    return max(1, min(programs // B, 64))


@dataclass(frozen=True, slots=True)
class Launch:
    kernel: Any
    grid: tuple[int, int]
    constants: dict[str, int]
    num_warps: int

    def __call__(self, *args: Any, **constants: Any) -> None:
        self.kernel[self.grid](*args, **self.constants, **constants, num_warps=self.num_warps)


@cache
def launches(B: int, H: int, R: int, V: int, processors: int) -> tuple[Launch, Launch, Launch]:
    """The three launches for B sequences: grids, tiles and warps."""
    splits = _splits(B, processors)
    tile = {"BLOCK_B": 16 if B <= 16 else 32, "BLOCK_R": min(R, 64)}
    grid = (H * (R // tile["BLOCK_R"]) + tile["BLOCK_B"], triton.cdiv(B, tile["BLOCK_B"]))
    absorb = Launch(_absorb, grid, tile, 4)
    tile = {"BLOCK_H": max(16, triton.next_power_of_2(H)), "BLOCK_N": BLOCK_N}
    attend = Launch(_attend, (splits, B), tile, 8)
    tile = {"SPLITS": splits, "BLOCK_S": triton.next_power_of_2(splits), "BLOCK_N": BLOCK_N}
    tile |= {"BLOCK_B": 1, "BLOCK_V": min(V, 32)} if B <= 4 else {"BLOCK_B": 16, "BLOCK_V": min(V, 64)}
    tile["BLOCK_R"] = min(R, 32768 // (tile["BLOCK_B"] * tile["BLOCK_S"]))
    combine = Launch(_combine, (H * (V // tile["BLOCK_V"]), triton.cdiv(B, tile["BLOCK_B"])), tile, 8)
    return absorb, attend, combine


def mla_mixer_decode(
    proj_BX: Tensor,
    kv_norm_weight_R: Tensor,
    w_uk_HKR: Tensor,
    w_uv_HVR: Tensor,
    pages_MSC: Tensor,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
    page_rows_B: Tensor,
    scale: float,
    eps: float,
) -> Tensor:
    B, (H, K, R), V = proj_BX.shape[0], w_uk_HKR.shape, w_uv_HVR.shape[1]
    page_size, P = pages_MSC.shape[1], pages_MSC.shape[2] - R
    o_BO = proj_BX.new_empty(B, H * V)
    if B == 0:
        return o_BO
    absorb, attend, combine = launches(B, H, R, V, multiprocessors(proj_BX.device))
    splits, pdl = attend.grid[0], pdl_options(proj_BX)
    q_latent_BHR = proj_BX.new_empty(B, H, R)
    part_BSHR = proj_BX.new_empty(B, splits, H, R)
    lse_BSH = proj_BX.new_empty(B, splits, H, dtype=torch.float32)
    absorb(
        proj_BX,
        kv_norm_weight_R,
        w_uk_HKR,
        pages_MSC,
        page_rows_B,
        q_latent_BHR,
        B,
        proj_BX.stride(0),
        w_uk_HKR.stride(0),
        eps,
        H=H,
        K=K,
        R=R,
        P=P,
        **pdl,
    )
    attend(
        proj_BX,
        q_latent_BHR,
        pages_MSC,
        block_tables_BN,
        context_lens_B,
        part_BSHR,
        lse_BSH,
        proj_BX.stride(0),
        block_tables_BN.stride(0),
        scale * LOG2_E,
        H=H,
        K=K,
        R=R,
        P=P,
        PAGE=page_size,
        **pdl,
    )
    combine(
        part_BSHR,
        lse_BSH,
        context_lens_B,
        w_uv_HVR,
        o_BO,
        B,
        w_uv_HVR.stride(0),
        H=H,
        R=R,
        V=V,
        **pdl,
    )
    return o_BO
