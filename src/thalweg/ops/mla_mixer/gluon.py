"""Attention of the MLA decode mixer for Hopper, in Gluon: bulk copies into rings of shared memory, wgmma out of them.

A program walks its split of a context in tiles of 64 tokens. A tile is two halves of the latent, [64, R / 2] each, which
serve as keys and as values, and the shared key part, [64, P]. Shared memory holds two tiles, and the place of a half is
filled again as soon as the last product with it is done: copies stay under way while products and softmax run.

The last tile of a context is copied from the 64 rows before the context's end: those before its page are out of bounds,
which the copy fills with zeros, and rows that hold no token are never read. Its tokens are then the tile's last.
"""

from __future__ import annotations

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

from thalweg.ops.triton_launch import pdl_options

BLOCK_N = 64  # tokens per tile: the rows of a matrix unit's tile


@gluon.jit
def _gdc_wait():
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _gdc_launch_dependents():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _copy(desc, page, row, column, bar, target, pred):
    """desc's block of rows that starts at `row` of `page` and at `column`, into target [rows, columns]."""
    block = target._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
    tma.async_copy_global_to_shared(desc, [page, row, column], bar, block, pred)


@gluon.jit
def _first_row(first, length, PAGE: gl.constexpr, BLOCK_N: gl.constexpr):
    """Where in its page the copy of the tile of token `first` starts: below 0 where fewer tokens are left."""
    return first % PAGE + gl.minimum(length - first, BLOCK_N) - BLOCK_N


@gluon.jit
def _copy_tile(half_desc, shared_desc, half0, half1, shared, page, row, bar):
    WIDTH: gl.constexpr = half_desc.block_type.shape[2]
    mbarrier.expect(bar, 2 * half_desc.block_type.nbytes + shared_desc.block_type.nbytes)
    _copy(half_desc, page, row, 0, bar, half0, True)
    _copy(half_desc, page, row, WIDTH, bar, half1, True)
    _copy(shared_desc, page, row, 2 * WIDTH, bar, shared, True)


@gluon.jit
def attend(
    q_ptr,
    half_desc,
    shared_desc,
    tables_ptr,
    lens_ptr,
    part_ptr,
    stats_ptr,
    table_stride,
    scale_log2,
    H: gl.constexpr,
    BLOCK_H: gl.constexpr,
    PAGE: gl.constexpr,
    PDL: gl.constexpr,
):
    dtype: gl.constexpr = half_desc.dtype
    BLOCK_N: gl.constexpr = half_desc.block_type.shape[1]
    WIDTH: gl.constexpr = half_desc.block_type.shape[2]
    P: gl.constexpr = shared_desc.block_type.shape[2]
    R: gl.constexpr = 2 * WIDTH
    TILES: gl.constexpr = 2  # in shared memory
    tile_bytes: gl.constexpr = 2 * half_desc.block_type.nbytes + shared_desc.block_type.nbytes
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_H, 16])
    per_head: gl.constexpr = gl.SliceLayout(0, mma)
    half_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, WIDTH], dtype)
    shared_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, P], dtype)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_H], dtype)
    q_half_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, WIDTH], dtype)
    q_shared_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, P], dtype)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])

    split = gl.program_id(0)
    splits = gl.num_programs(0)
    b = gl.program_id(1)
    if PDL:
        _gdc_launch_dependents()

    kv0 = gl.allocate_shared_memory(dtype, [TILES, BLOCK_N, WIDTH], half_layout)
    kv1 = gl.allocate_shared_memory(dtype, [TILES, BLOCK_N, WIDTH], half_layout)
    k = gl.allocate_shared_memory(dtype, [TILES, BLOCK_N, P], shared_layout)
    q_halves = gl.allocate_shared_memory(dtype, [2, BLOCK_H, WIDTH], q_half_layout)
    q_shared = gl.allocate_shared_memory(dtype, [BLOCK_H, P], q_shared_layout)
    p_smem = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_H], p_layout)
    bars = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(TILES):
        mbarrier.init(bars.index(j), count=1)
    fence_async_shared()

    length = gl.load(lens_ptr + b)
    span = gl.cdiv(gl.cdiv(length, BLOCK_N), splits)  # tiles
    start = split * span * BLOCK_N
    n = gl.minimum(span, gl.cdiv(gl.maximum(length - start, 0), BLOCK_N))
    table_ptr = tables_ptr + b.to(gl.int64) * table_stride
    pages = ()  # of tiles 0 .. TILES; a page that does not exist is replaced by one that does
    for j in gl.static_range(TILES + 1):
        pages = pages + (gl.load(table_ptr + gl.where(j < n, start + j * BLOCK_N, 0) // PAGE),)
    # The kernel ahead writes the newest token: its tile, the context's last, has to wait for it.
    newest = (length - 1 - start) // BLOCK_N
    for j in gl.static_range(TILES):
        if (j < n) & (j != newest):
            row = _first_row(start + j * BLOCK_N, length, PAGE, BLOCK_N)
            _copy_tile(half_desc, shared_desc, kv0.index(j), kv1.index(j), k.index(j), pages[j], row, bars.index(j))
    if PDL:
        _gdc_wait()
    if n > 0:
        h = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, rows))[:, None]
        r = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, rows))[None, :]
        p = gl.arange(0, P, layout=gl.SliceLayout(0, rows))[None, :]
        q_ptrs = q_ptr + (b.to(gl.int64) * H + h) * (R + P)
        q0_HR = gl.load(q_ptrs + r, mask=h < H, other=0.0)
        q1_HR = gl.load(q_ptrs + WIDTH + r, mask=h < H, other=0.0)
        q_HP = gl.load(q_ptrs + R + p, mask=h < H, other=0.0)
        if newest < gl.minimum(n, TILES):
            slot = newest % TILES
            row = _first_row(start + newest * BLOCK_N, length, PAGE, BLOCK_N)
            page = gl.where(newest == 0, pages[0], pages[1])
            bar = bars.index(slot)
            _copy_tile(half_desc, shared_desc, kv0.index(slot), kv1.index(slot), k.index(slot), page, row, bar)

        q_halves.index(0).store(q0_HR)
        q_halves.index(1).store(q1_HR)
        q_shared.store(q_HP)
        fence_async_shared()

        i = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, mma))
        m_H = gl.full([BLOCK_H], float("-inf"), gl.float32, layout=per_head)
        l_NH = gl.zeros([BLOCK_N, BLOCK_H], gl.float32, layout=mma)
        acc0_RH = gl.zeros([WIDTH, BLOCK_H], gl.float32, layout=mma)
        acc1_RH = gl.zeros([WIDTH, BLOCK_H], gl.float32, layout=mma)
        later_page = pages[TILES]
        for t in range(n):
            slot, later = t % TILES, t + TILES
            kv0_NR, kv1_NR, k_NP, bar = kv0.index(slot), kv1.index(slot), k.index(slot), bars.index(slot)
            page_after = gl.load(table_ptr + gl.where(later + 1 < n, start + (later + 1) * BLOCK_N, 0) // PAGE)
            mbarrier.wait(bar, t // TILES & 1)
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
            row = _first_row(start + later * BLOCK_N, length, PAGE, BLOCK_N)
            acc0_RH, acc1_RH = warpgroup_mma_wait(1, deps=(acc0_RH, acc1_RH))
            gl.thread_barrier()
            _copy(half_desc, later_page, row, 0, bar, kv0_NR, later < n)
            acc0_RH, acc1_RH = warpgroup_mma_wait(0, deps=(acc0_RH, acc1_RH))
            gl.thread_barrier()
            _copy(half_desc, later_page, row, WIDTH, bar, kv1_NR, later < n)
            _copy(shared_desc, later_page, row, R, bar, k_NP, later < n)
            later_page = page_after

        l_H = gl.sum(l_NH, 0)
        part_row = (b.to(gl.int64) * splits + split) * H
        stats_ptrs = stats_ptr + 2 * part_row + gl.arange(0, BLOCK_H, layout=per_head)
        own = gl.arange(0, BLOCK_H, layout=per_head) < H
        gl.store(stats_ptrs, m_H, mask=own)
        gl.store(stats_ptrs + H, l_H, mask=own)
        # Through shared memory, where the queries were, so that whole rows go out.
        q_halves.index(0).store(gl.permute(acc0_RH, (1, 0)).to(dtype))
        q_halves.index(1).store(gl.permute(acc1_RH, (1, 0)).to(dtype))
        out_ptrs = part_ptr + (part_row + h) * R + r
        gl.store(out_ptrs, q_halves.index(0).load(rows), mask=h < H)
        gl.store(out_ptrs + WIDTH, q_halves.index(1).load(rows), mask=h < H)


def serves(pages_MSC: Tensor, rank: int) -> bool:
    """Whether `launch` can take these pages: whole tiles, and rings that fit into shared memory."""
    page_size, C = pages_MSC.shape[1:]
    return pages_MSC.is_cuda and page_size % BLOCK_N == 0 and rank % 128 == 0 and rank <= 512 and C - rank <= 64


def launch(
    splits: int,
    q_BHC: Tensor,
    pages_MSC: Tensor,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
    part_BSHR: Tensor,
    stats_BS2H: Tensor,
    scale_log2: float,
) -> None:
    (B, H, C), R = q_BHC.shape, part_BSHR.shape[-1]
    attend[(splits, B)](
        q_BHC,
        _descriptor(pages_MSC, R // 2),
        _descriptor(pages_MSC, C - R),
        block_tables_BN,
        context_lens_B,
        part_BSHR,
        stats_BS2H,
        block_tables_BN.stride(0),
        scale_log2,
        H=H,
        BLOCK_H=max(16, triton.next_power_of_2(H)),
        PAGE=pages_MSC.shape[1],
        num_warps=4,
        **pdl_options(q_BHC),
    )


def _descriptor(pages_MSC: Tensor, width: int) -> TensorDescriptor:
    """For copies of `width` channels of a tile."""
    block = [1, BLOCK_N, width]
    return TensorDescriptor.from_tensor(pages_MSC, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))
