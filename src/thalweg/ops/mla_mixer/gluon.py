"""Attention of the MLA decode mixer for Hopper, in Gluon: bulk copies into rings of shared memory, wgmma out of them.

A program walks its split of a context in tiles of 64 tokens. A tile is two halves of the latent, [64, R / 2] each, which
serve as keys and as values, and the shared key part, [64, P]. The ring of halves holds two tiles and a half, and a place
is filled again as soon as the last product with it is done: copies stay under way while products and softmax run.

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
HALVES = 5  # places in the ring of halves


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
def _fill(
    half_desc,
    shared_desc,
    halves,
    shareds,
    bars,
    pages,
    start,
    length,
    n,
    newest,
    NEWEST: gl.constexpr,
    PAGE: gl.constexpr,
):
    """Fill the empty rings from the first of the n tiles from token `start`: from tile `newest` alone, or all but it."""
    BLOCK_N: gl.constexpr = halves.shape[1]
    WIDTH: gl.constexpr = halves.shape[2]
    AHEAD: gl.constexpr = shareds.shape[0]
    for t in gl.static_range(AHEAD):
        if (t < n) & ((t == newest) == NEWEST):
            first = start + t * BLOCK_N
            row = _first_row(first, length, PAGE, BLOCK_N)
            bar = bars.index(t)
            mbarrier.expect(bar, 2 * half_desc.block_type.nbytes + shared_desc.block_type.nbytes)
            for u in gl.static_range(2):
                if 2 * t + u < halves.shape[0]:
                    _copy(half_desc, pages[t], row, u * WIDTH, bar, halves.index(2 * t + u), True)
            _copy(shared_desc, pages[t], row, 2 * WIDTH, bar, shareds.index(t), True)


@gluon.jit
def attend(
    q_half_desc,
    q_shared_desc,
    half_desc,
    shared_desc,
    tables_ptr,
    lens_ptr,
    part_ptr,
    stats_ptr,
    table_stride,
    scale_log2,
    H: gl.constexpr,
    PAGE: gl.constexpr,
    HALVES: gl.constexpr,
    PDL: gl.constexpr,
):
    dtype: gl.constexpr = half_desc.dtype
    BLOCK_N: gl.constexpr = half_desc.block_type.shape[1]
    WIDTH: gl.constexpr = half_desc.block_type.shape[2]
    P: gl.constexpr = shared_desc.block_type.shape[2]
    BLOCK_H: gl.constexpr = q_half_desc.block_type.shape[0]
    R: gl.constexpr = 2 * WIDTH
    AHEAD: gl.constexpr = (HALVES + 1) // 2  # tiles that may be under way
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_H, 16])
    per_head: gl.constexpr = gl.SliceLayout(0, mma)
    half_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, WIDTH], dtype)
    shared_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, P], dtype)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_H], dtype)
    o_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])

    split = gl.program_id(0)
    splits = gl.num_programs(0)
    b = gl.program_id(1)
    if PDL:
        _gdc_launch_dependents()

    halves = gl.allocate_shared_memory(dtype, [HALVES, BLOCK_N, WIDTH], half_layout)
    shareds = gl.allocate_shared_memory(dtype, [AHEAD, BLOCK_N, P], shared_layout)
    q_halves = gl.allocate_shared_memory(dtype, [2, BLOCK_H, WIDTH], q_half_desc.layout)
    q_shared = gl.allocate_shared_memory(dtype, [BLOCK_H, P], q_shared_desc.layout)
    p_smem = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_H], p_layout)
    bars = gl.allocate_shared_memory(gl.int64, [AHEAD + 1, 1], mbarrier.MBarrierLayout())
    q_bar = bars.index(AHEAD)
    for j in gl.static_range(AHEAD + 1):
        mbarrier.init(bars.index(j), count=1)
    fence_async_shared()

    length = gl.load(lens_ptr + b)
    span = gl.cdiv(gl.cdiv(length, BLOCK_N), splits)  # tiles
    start = split * span * BLOCK_N
    n = gl.minimum(span, gl.cdiv(gl.maximum(length - start, 0), BLOCK_N))
    table_ptr = tables_ptr + b.to(gl.int64) * table_stride
    pages = ()
    for j in gl.static_range(AHEAD + 1):
        tile = gl.maximum(gl.minimum(j, n - 1), 0)
        pages = pages + (gl.load(table_ptr + gl.where(n > 0, start + tile * BLOCK_N, 0) // PAGE),)
    # The kernel ahead writes the newest token: its tile, the context's last, has to wait for it.
    newest = (length - 1 - start) // BLOCK_N
    _fill(half_desc, shared_desc, halves, shareds, bars, pages, start, length, n, newest, False, PAGE)
    if PDL:
        _gdc_wait()
    if n > 0:
        mbarrier.expect(q_bar, 2 * q_half_desc.block_type.nbytes + q_shared_desc.block_type.nbytes)
        for u in gl.static_range(2):
            tma.async_copy_global_to_shared(q_half_desc, [b * H, u * WIDTH], q_bar, q_halves.index(u))
        tma.async_copy_global_to_shared(q_shared_desc, [b * H, R], q_bar, q_shared)
        _fill(half_desc, shared_desc, halves, shareds, bars, pages, start, length, n, newest, True, PAGE)

        i = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, mma))
        m_H = gl.full([BLOCK_H], float("-inf"), gl.float32, layout=per_head)
        l_NH = gl.zeros([BLOCK_N, BLOCK_H], gl.float32, layout=mma)
        acc0_RH = gl.zeros([WIDTH, BLOCK_H], gl.float32, layout=mma)
        acc1_RH = gl.zeros([WIDTH, BLOCK_H], gl.float32, layout=mma)
        # A place that becomes free in tile t is for tile t + AHEAD - 1 or t + AHEAD.
        page, next_page = pages[AHEAD - 1], pages[AHEAD]
        mbarrier.wait(q_bar, 0)
        for t in range(n):
            page_after = gl.load(table_ptr + (start + gl.minimum(t + AHEAD + 1, n - 1) * BLOCK_N) // PAGE)
            bar = bars.index(t % AHEAD)
            kv0_NR, kv1_NR, k_NP = (
                halves.index(2 * t % HALVES),
                halves.index((2 * t + 1) % HALVES),
                shareds.index(t % AHEAD),
            )
            mbarrier.wait(bar, t // AHEAD & 1)
            mbarrier.expect(bar, 2 * half_desc.block_type.nbytes + shared_desc.block_type.nbytes, pred=t + AHEAD < n)
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
            p_smem.store(p_NH.to(dtype))
            fence_async_shared()
            acc0_RH = warpgroup_mma(kv0_NR.permute((1, 0)), p_smem, acc0_RH * keep_H[None, :], is_async=True)
            acc1_RH = warpgroup_mma(kv1_NR.permute((1, 0)), p_smem, acc1_RH * keep_H[None, :], is_async=True)
            for u in gl.static_range(2):
                acc0_RH, acc1_RH = warpgroup_mma_wait(1 - u, deps=(acc0_RH, acc1_RH))
                gl.thread_barrier()
                late = (u + HALVES) // 2  # tiles from now
                first = start + (t + late) * BLOCK_N
                row = _first_row(first, length, PAGE, BLOCK_N)
                from_page = next_page if late == AHEAD else page
                late_bar, pred = bars.index((t + late) % AHEAD), t + late < n
                column = (u + HALVES) % 2 * WIDTH
                _copy(half_desc, from_page, row, column, late_bar, halves.index((2 * t + u) % HALVES), pred)
            first = start + (t + AHEAD) * BLOCK_N
            row = _first_row(first, length, PAGE, BLOCK_N)
            _copy(shared_desc, next_page, row, R, bar, k_NP, t + AHEAD < n)
            page, next_page = next_page, page_after

        l_H = gl.sum(l_NH, 0)
        part_row = (b.to(gl.int64) * splits + split) * H
        h = gl.arange(0, BLOCK_H, layout=per_head)
        gl.store(stats_ptr + 2 * part_row + h, m_H, mask=h < H)
        gl.store(stats_ptr + 2 * part_row + H + h, l_H, mask=h < H)
        h = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, o_layout))
        r = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, o_layout))
        out_ptrs = part_ptr + (part_row + h[:, None]) * R + r[None, :]
        # Through shared memory, where the queries were, so that whole rows go out.
        q_halves.index(0).store(gl.permute(acc0_RH, (1, 0)).to(dtype))
        q_halves.index(1).store(gl.permute(acc1_RH, (1, 0)).to(dtype))
        gl.store(out_ptrs, q_halves.index(0).load(o_layout), mask=h[:, None] < H)
        gl.store(out_ptrs + WIDTH, q_halves.index(1).load(o_layout), mask=h[:, None] < H)


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
    block_h = max(16, triton.next_power_of_2(H))
    q, half, shared = q_BHC.flatten(0, 1), R // 2, C - R
    attend[(splits, B)](
        _descriptor(q, [block_h, half]),
        _descriptor(q, [block_h, shared]),
        _descriptor(pages_MSC, [1, BLOCK_N, half]),
        _descriptor(pages_MSC, [1, BLOCK_N, shared]),
        block_tables_BN,
        context_lens_B,
        part_BSHR,
        stats_BS2H,
        block_tables_BN.stride(0),
        scale_log2,
        H=H,
        PAGE=pages_MSC.shape[1],
        HALVES=HALVES,
        num_warps=4,
        **pdl_options(q_BHC),
    )


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor.from_tensor(tensor, block, layout)
