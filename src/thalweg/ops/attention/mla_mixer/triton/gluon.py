"""Decode of latent attention with two of its three kernels in Gluon, for Hopper: bulk copies into shared memory, wgmma
out of it. The first kernel, which absorbs, is module mixer's; the second for many heads is module many_heads', and the
third module combining's. For several sequences these two are one launch if each program has a multiprocessor.

`attend`: a program walks its split of a context in tiles of 64 tokens. A tile is two halves of the latent, [64, R / 2]
each, which serve as keys and as values, and the shared key part, [64, P]. Shared memory holds two tiles, and the place
of a half is filled again as soon as the last product with it is done: copies stay under way while products and softmax
run.

The last tile of a context comes from the 64 rows before the context's end: those before the block are out of bounds,
which the copy fills with zeros, and rows that hold no token are never read. Its tokens are then the tile's last.

The first two tiles, unless one has the newest token, are copied before the wait for the kernel ahead.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from thalweg.ops.attention.mla_mixer import TILE
from thalweg.ops.attention.mla_mixer.triton import many_heads
from thalweg.ops.attention.mla_mixer.triton.bulk_copies import (
    barrier,
    copy,
    first_row,
    gdc_launch_dependents,
    gdc_wait,
)
from thalweg.ops.attention.mla_mixer.triton.combining import combine, combine_here
from thalweg.ops.attention.mla_mixer.triton.mixer import LOG2_E, best_splits, launches, run_absorb
from thalweg.ops.toolchain.counters import counters
from thalweg.ops.toolchain.triton_launch import pdl_options
from thalweg.ops.toolchain.triton_support import multiprocessors

BLOCK_N = TILE  # tokens per tile: the rows of a matrix unit's tile


@gluon.jit
def _copy_tile(half_desc, shared_desc, half0, half1, shared, block, row, bar):
    WIDTH: gl.constexpr = half_desc.block_type.shape[2]
    mbarrier.expect(bar, 2 * half_desc.block_type.nbytes + shared_desc.block_type.nbytes)
    copy(half_desc, block, row, 0, bar, half0, True)
    copy(half_desc, block, row, WIDTH, bar, half1, True)
    copy(shared_desc, block, row, 2 * WIDTH, bar, shared, True)


@gluon.jit(do_not_specialize=["B", "table_stride"])
def attend(
    q_half_desc,
    q_shared_desc,
    half_desc,
    shared_desc,
    part_desc,
    parts_desc,
    w_uv_desc,
    tables_ptr,
    lens_ptr,
    stats_ptr,
    out_ptr,
    arrived_ptr,
    B,
    table_stride,
    scale_log2,
    H: gl.constexpr,
    BLOCK_S: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    PDL: gl.constexpr,
    V: gl.constexpr,
    TOGETHER: gl.constexpr,
):
    dtype: gl.constexpr = half_desc.dtype
    BLOCK_N: gl.constexpr = half_desc.block_type.shape[1]
    WIDTH: gl.constexpr = half_desc.block_type.shape[2]
    P: gl.constexpr = shared_desc.block_type.shape[2]
    BLOCK_H: gl.constexpr = q_half_desc.block_type.shape[0]
    R: gl.constexpr = 2 * WIDTH
    tile_bytes: gl.constexpr = 2 * half_desc.block_type.nbytes + shared_desc.block_type.nbytes
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_H, 16])
    per_head: gl.constexpr = gl.SliceLayout(0, mma)
    half_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, WIDTH], dtype)
    shared_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, P], dtype)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_H], dtype)

    split = gl.program_id(0)
    splits = gl.num_programs(0)
    b = gl.program_id(1)
    first_h = gl.program_id(2) * BLOCK_H
    if PDL:
        gdc_launch_dependents()

    kv0 = gl.allocate_shared_memory(dtype, [2, BLOCK_N, WIDTH], half_layout)
    kv1 = gl.allocate_shared_memory(dtype, [2, BLOCK_N, WIDTH], half_layout)
    k = gl.allocate_shared_memory(dtype, [2, BLOCK_N, P], shared_layout)
    q_halves = gl.allocate_shared_memory(dtype, [2, BLOCK_H, WIDTH], q_half_desc.layout)
    q_shared = gl.allocate_shared_memory(dtype, [BLOCK_H, P], q_shared_desc.layout)
    p_smem = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_H], p_layout)
    bars = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    q_bar = bars.index(2)
    for j in gl.static_range(3):
        mbarrier.init(bars.index(j), count=1)
    fence_async_shared()

    length = gl.load(lens_ptr + b)
    span = gl.cdiv(gl.cdiv(length, BLOCK_N), splits)  # tiles
    start = split * span * BLOCK_N
    n = gl.minimum(span, gl.cdiv(gl.maximum(length - start, 0), BLOCK_N))
    table_ptr = tables_ptr + b.to(gl.int64) * table_stride
    # Of a tile that does not exist, the first block of all.
    block0 = gl.load(table_ptr + gl.where(n > 0, start, 0) // BLOCK_SIZE)
    block1 = gl.load(table_ptr + gl.where(n > 1, start + BLOCK_N, 0) // BLOCK_SIZE)
    later_block = gl.load(table_ptr + gl.where(n > 2, start + 2 * BLOCK_N, 0) // BLOCK_SIZE)
    # The kernel ahead writes the newest token: its tile, the context's last, has to wait for it.
    newest = (length - 1 - start) // BLOCK_N
    for j in gl.static_range(2):
        if (j < n) & (j != newest):
            row = first_row(start + j * BLOCK_N, length, BLOCK_SIZE, BLOCK_N)
            block = block0 if j == 0 else block1
            _copy_tile(half_desc, shared_desc, kv0.index(j), kv1.index(j), k.index(j), block, row, bars.index(j))
    if PDL:
        gdc_wait()
    if n > 0:
        mbarrier.expect(q_bar, 2 * q_half_desc.block_type.nbytes + q_shared_desc.block_type.nbytes)
        for j in gl.static_range(2):
            tma.async_copy_global_to_shared(q_half_desc, [b * H + first_h, j * WIDTH], q_bar, q_halves.index(j))
        tma.async_copy_global_to_shared(q_shared_desc, [b * H + first_h, R], q_bar, q_shared)
        if newest < gl.minimum(n, 2):
            slot = newest % 2
            row = first_row(start + newest * BLOCK_N, length, BLOCK_SIZE, BLOCK_N)
            block = gl.where(newest == 0, block0, block1)
            bar = bars.index(slot)
            _copy_tile(half_desc, shared_desc, kv0.index(slot), kv1.index(slot), k.index(slot), block, row, bar)

        i = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, mma))
        m_H = gl.full([BLOCK_H], float("-inf"), gl.float32, layout=per_head)
        l_NH = gl.zeros([BLOCK_N, BLOCK_H], gl.float32, layout=mma)
        acc0_RH = gl.zeros([WIDTH, BLOCK_H], gl.float32, layout=mma)
        acc1_RH = gl.zeros([WIDTH, BLOCK_H], gl.float32, layout=mma)
        mbarrier.wait(q_bar, 0)
        for t in range(n):
            slot, later = t % 2, t + 2
            kv0_NR, kv1_NR, k_NP, bar = kv0.index(slot), kv1.index(slot), k.index(slot), bars.index(slot)
            block_after = gl.load(table_ptr + gl.where(later + 1 < n, start + (later + 1) * BLOCK_N, 0) // BLOCK_SIZE)
            mbarrier.wait(bar, t // 2 % 2)
            scores_NH = gl.zeros([BLOCK_N, BLOCK_H], gl.float32, layout=mma)
            scores_NH = warpgroup_mma(
                kv0_NR, q_halves.index(0).permute((1, 0)), scores_NH, use_acc=False, is_async=True
            )
            scores_NH = warpgroup_mma(kv1_NR, q_halves.index(1).permute((1, 0)), scores_NH, is_async=True)
            scores_NH = warpgroup_mma(k_NP, q_shared.permute((1, 0)), scores_NH, is_async=True)
            scores_NH = warpgroup_mma_wait(0, deps=(scores_NH,))
            seen = i >= start + (t + 1) * BLOCK_N - length
            scores_NH = gl.where(seen[:, None], scores_NH * scale_log2, float("-inf"))
            new_m_H = gl.maximum(m_H, gl.max(scores_NH, 0))
            p_NH = gl.exp2(scores_NH - new_m_H[None, :])
            keep_H = gl.exp2(m_H - new_m_H)
            m_H = new_m_H
            l_NH = l_NH * keep_H[None, :] + p_NH
            mbarrier.expect(bar, tile_bytes, pred=later < n)
            p_smem.store(p_NH.to(dtype))
            fence_async_shared()
            acc0_RH = warpgroup_mma(kv0_NR.permute((1, 0)), p_smem, acc0_RH * keep_H[None, :], is_async=True)
            acc1_RH = warpgroup_mma(kv1_NR.permute((1, 0)), p_smem, acc1_RH * keep_H[None, :], is_async=True)
            # The place of what every warp is done with is filled again at once.
            row = first_row(start + later * BLOCK_N, length, BLOCK_SIZE, BLOCK_N)
            acc0_RH, acc1_RH = warpgroup_mma_wait(1, deps=(acc0_RH, acc1_RH))
            barrier()
            copy(half_desc, later_block, row, 0, bar, kv0_NR, later < n)
            acc0_RH, acc1_RH = warpgroup_mma_wait(0, deps=(acc0_RH, acc1_RH))
            barrier()
            copy(half_desc, later_block, row, WIDTH, bar, kv1_NR, later < n)
            copy(shared_desc, later_block, row, R, bar, k_NP, later < n)
            later_block = block_after

        # Through shared memory, where the queries were, so that whole rows go out.
        row = b * BLOCK_S + split
        q_halves.index(0).store(gl.permute(acc0_RH, (1, 0)).to(dtype))
        q_halves.index(1).store(gl.permute(acc1_RH, (1, 0)).to(dtype))
        fence_async_shared()
        barrier()
        for j in gl.static_range(2):
            part = q_halves.index(j)._reinterpret(dtype, part_desc.block_type.shape, part_desc.layout)
            tma.async_copy_shared_to_global(part_desc, [row, first_h, j * WIDTH], part)
        h = first_h + gl.arange(0, BLOCK_H, layout=per_head)
        stats_ptrs = stats_ptr + row.to(gl.int64) * (2 * H) + h
        own = h < H
        gl.store(stats_ptrs, m_H, mask=own)
        gl.store(stats_ptrs + H, gl.sum(l_NH, 0), mask=own)
        if not TOGETHER:
            tma.store_wait(0)
    if TOGETHER:
        combine_here(parts_desc, w_uv_desc, lens_ptr, stats_ptr, out_ptr, arrived_ptr, B, H, V, BLOCK_S, BLOCK_N, PDL)


def tiles(V: int, splits: int) -> tuple[int, int, int]:
    """(splits, columns (sequence and split), values) that a program of `combine` works on."""
    block_s = triton.next_power_of_2(splits)
    columns = 32 if block_s == 1 else max(64, block_s)
    # w_uv has to fit into shared memory beside the columns.
    return block_s, columns, min(V, 128 if columns <= 64 else 64)


def heads_and_splits(B: int, H: int, processors: int) -> tuple[int, int]:
    """Heads that a program of `attend` works on, and parts of each context.

    Measured on an H200 with 64 heads and contexts of 4000 tokens: from 16 sequences on, reading a context once pays for
    longer programs. With contexts of 16000 tokens it would with 8.
    """
    block_h = max(16, min(64 if B * H >= 1024 else 32, triton.next_power_of_2(H)))
    return block_h, best_splits(B * triton.cdiv(H, block_h), processors)


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
    o_BO = proj_BX.new_empty(B, H * V)
    if B == 0:
        return o_BO
    processors = multiprocessors(proj_BX.device)
    absorb, *_ = launches(B, H, R, V, processors)
    new = dict(kv_norm_weight_R=kv_norm_weight_R, block_rows_B=block_rows_B, eps=eps)
    q_BHC = run_absorb(absorb, proj_BX, w_uk_HKR, blocks_MSC, **new)
    context = (blocks_MSC, block_tables_BN, context_lens_B)
    launch(*heads_and_splits(B, H, processors), q_BHC, *context, w_uv_HVR, o_BO, scale * LOG2_E)
    return o_BO


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
    o_BO = q_BO.new_empty(B, H * V)
    if B == 0:
        return o_BO
    processors = multiprocessors(q_BO.device)
    absorb, *_ = launches(B, H, R, V, processors, rotated=True)
    rotation = dict(positions_B=positions_B, frequencies_F=frequencies_F, rope_scale=rope_scale)
    q_BHC = run_absorb(absorb, q_BO, w_uk_HKR, blocks_MSC, **rotation)
    context = (blocks_MSC, block_tables_BN, context_lens_B)
    together = B > 1  # Slower, for a launch less, which one sequence saves elsewhere (op "routed_experts").
    launch(*heads_and_splits(B, H, processors), q_BHC, *context, w_uv_HVR, o_BO, scale * LOG2_E, together)
    return o_BO


def launch(
    block_h: int,
    splits: int,
    q_BHC: Tensor,
    blocks_MSC: Tensor,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
    w_uv_HVR: Tensor,
    o_BO: Tensor,
    scale_log2: float,
    together: bool = False,
) -> None:
    """o_BO from the absorbed queries: a program for `block_h` heads, each context in `splits` (at most 128) parts.

    `together`: in one launch, whose programs await one another, if each has a multiprocessor. That is a launch less,
    and takes 1 to 3 us more than two.
    """
    (B, H, C), (_, V, R) = q_BHC.shape, w_uv_HVR.shape
    block_s, columns, block_v = tiles(V, splits)
    part_NHR = q_BHC.new_empty(B * block_s, H, R)
    stats_N2H = q_BHC.new_empty(B * block_s, 2, H, dtype=torch.float32)  # maximum and sum of each split's weights
    q, half = q_BHC.flatten(0, 1), R // 2
    pdl = pdl_options(q_BHC)
    many = block_h > 32
    kernel, width = (many_heads.attend, R) if many else (attend, half)
    programs, rows = splits * B * triton.cdiv(H, block_h), H * (V // block_v)
    combining = rows * triton.cdiv(B * block_s, columns)  # programs, or those of one launch that go on
    together = together and combining <= programs <= multiprocessors(q.device)
    if together and not many and block_v == 128 and 2 * combining <= programs:
        block_v, rows = 64, 2 * rows  # half of the rows for each, so that all go on
    parts, w_uv = _descriptor(part_NHR, [columns, 1, half]), _descriptor(w_uv_HVR, [1, block_v, half])
    kernel[(splits, B, triton.cdiv(H, block_h))](
        _descriptor(q, [block_h, width]),
        _descriptor(q, [block_h, C - R]),
        _descriptor(blocks_MSC, [1, BLOCK_N, width]),
        _descriptor(blocks_MSC, [1, BLOCK_N, C - R]),
        _descriptor(part_NHR, [1, block_h, width]),
        parts,
        w_uv,
        block_tables_BN,
        context_lens_B,
        stats_N2H,
        o_BO,
        # Programs that have their results, and that have seen those of all.
        counters("mla_decode", q.device, 2) if together else stats_N2H,
        B,
        block_tables_BN.stride(0),
        scale_log2,
        H=H,
        BLOCK_S=block_s,
        BLOCK_SIZE=blocks_MSC.shape[1],
        V=V,
        TOGETHER=together,
        num_warps=8 if many else 4,
        **pdl,
    )
    if together:
        return
    combine[(rows, triton.cdiv(B * block_s, columns))](
        parts,
        w_uv,
        context_lens_B,
        stats_N2H,
        o_BO,
        B,
        splits,
        H=H,
        V=V,
        BLOCK_S=block_s,
        BLOCK_N=BLOCK_N,
        num_warps=block_v // 16,
        **pdl,
    )


def _descriptor(tensor: Tensor, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, box, _layout(*box))


@functools.cache
def _layout(*box: int) -> gl.NVMMASharedLayout:
    """In shared memory, of a box whose rows are all dimensions but the last."""
    layout = gl.NVMMASharedLayout.get_default_for([max(box[:-1]), box[-1]], gl.bfloat16)
    return dataclasses.replace(layout, rank=len(box))
