"""`attend` of module gluon for many heads, in Gluon for Hopper: 64 heads are the rows of a matrix unit's tile, and two
warpgroups share a tile of 64 tokens.

Each computes the scores of half of the tokens, and sums half of the latent's channels over all of them. A program then
reads a context once for 64 heads, where two programs of 32 would be held up by what L2 can give.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from thalweg.ops.attention.mla_mixer.triton.bulk_copies import (
    barrier,
    copy,
    first_row,
    gdc_launch_dependents,
    gdc_wait,
)
from thalweg.ops.attention.mla_mixer.triton.combining import combine_here


@gluon.jit
def _copy_tile(latent_desc, shared_desc, latent, shared, block, row, bar, pred):
    R: gl.constexpr = latent_desc.block_type.shape[2]
    mbarrier.expect(bar, latent_desc.block_type.nbytes + shared_desc.block_type.nbytes, pred=pred)
    copy(latent_desc, block, row, 0, bar, latent, pred)
    copy(shared_desc, block, row, R, bar, shared, pred)


@gluon.jit(do_not_specialize=["B", "table_stride"])
def attend(
    q_latent_desc,
    q_shared_desc,
    latent_desc,
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
    dtype: gl.constexpr = latent_desc.dtype
    BLOCK_N: gl.constexpr = latent_desc.block_type.shape[1]
    R: gl.constexpr = latent_desc.block_type.shape[2]
    P: gl.constexpr = shared_desc.block_type.shape[2]
    BLOCK_H: gl.constexpr = q_latent_desc.block_type.shape[0]
    GROUPS: gl.constexpr = gl.num_warps() // 4
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, BLOCK_N // GROUPS, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, R // GROUPS, 16])
    per_head: gl.constexpr = gl.SliceLayout(1, of_scores)
    latent_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, R], dtype)
    shared_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, P], dtype)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, BLOCK_N], dtype)

    split = gl.program_id(0)
    splits = gl.num_programs(0)
    b = gl.program_id(1)
    first_h = gl.program_id(2) * BLOCK_H
    if PDL:
        gdc_launch_dependents()

    latents = gl.allocate_shared_memory(dtype, [2, BLOCK_N, R], latent_layout)
    keys = gl.allocate_shared_memory(dtype, [2, BLOCK_N, P], shared_layout)
    q_latent = gl.allocate_shared_memory(dtype, [BLOCK_H, R], q_latent_desc.layout)
    q_shared = gl.allocate_shared_memory(dtype, [BLOCK_H, P], q_shared_desc.layout)
    p_smem = gl.allocate_shared_memory(dtype, [BLOCK_H, BLOCK_N], p_layout)
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
    # A kernel ahead writes the newest token: its tile, the context's last, has to wait for it.
    newest = (length - 1 - start) // BLOCK_N
    for j in gl.static_range(2):
        row = first_row(start + j * BLOCK_N, length, BLOCK_SIZE, BLOCK_N)
        block = block0 if j == 0 else block1
        early = (j < n) & (j != newest)
        _copy_tile(latent_desc, shared_desc, latents.index(j), keys.index(j), block, row, bars.index(j), early)
    if PDL:
        gdc_wait()
    if n > 0:
        mbarrier.expect(q_bar, q_latent_desc.block_type.nbytes + q_shared_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_latent_desc, [b * H + first_h, 0], q_bar, q_latent)
        tma.async_copy_global_to_shared(q_shared_desc, [b * H + first_h, R], q_bar, q_shared)
        if newest < gl.minimum(n, 2):
            slot = newest % 2
            row = first_row(start + newest * BLOCK_N, length, BLOCK_SIZE, BLOCK_N)
            block = gl.where(newest == 0, block0, block1)
            _copy_tile(
                latent_desc, shared_desc, latents.index(slot), keys.index(slot), block, row, bars.index(slot), True
            )

        i = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, of_scores))
        m_H = gl.full([BLOCK_H], float("-inf"), gl.float32, layout=per_head)
        l_HN = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, layout=of_scores)
        acc_HR = gl.zeros([BLOCK_H, R], gl.float32, layout=of_sums)
        mbarrier.wait(q_bar, 0)
        for t in range(n):
            slot, later = t % 2, t + 2
            latent_NR, k_NP, bar = latents.index(slot), keys.index(slot), bars.index(slot)
            block_after = gl.load(table_ptr + gl.where(later + 1 < n, start + (later + 1) * BLOCK_N, 0) // BLOCK_SIZE)
            mbarrier.wait(bar, t // 2 % 2)
            scores_HN = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, layout=of_scores)
            scores_HN = warpgroup_mma(q_latent, latent_NR.permute((1, 0)), scores_HN, use_acc=False, is_async=True)
            scores_HN = warpgroup_mma(q_shared, k_NP.permute((1, 0)), scores_HN, is_async=True)
            scores_HN = warpgroup_mma_wait(0, deps=(scores_HN,))
            seen = i >= start + (t + 1) * BLOCK_N - length
            scores_HN = gl.where(seen[None, :], scores_HN * scale_log2, float("-inf"))
            new_m_H = gl.maximum(m_H, gl.max(scores_HN, 1))
            p_HN = gl.exp2(scores_HN - new_m_H[:, None])
            keep_H = gl.exp2(m_H - new_m_H)
            m_H = new_m_H
            l_HN = l_HN * keep_H[:, None] + p_HN
            p_smem.store(p_HN.to(dtype))
            fence_async_shared()
            keep_H = gl.convert_layout(keep_H, gl.SliceLayout(1, of_sums))
            acc_HR = warpgroup_mma(p_smem, latent_NR, acc_HR * keep_H[:, None], is_async=True)
            acc_HR = warpgroup_mma_wait(0, deps=(acc_HR,))
            barrier()
            row = first_row(start + later * BLOCK_N, length, BLOCK_SIZE, BLOCK_N)
            _copy_tile(latent_desc, shared_desc, latent_NR, k_NP, later_block, row, bar, later < n)
            later_block = block_after

        # Through shared memory, where the queries were, so that whole rows go out.
        row = b * BLOCK_S + split
        q_latent.store(acc_HR.to(dtype))
        fence_async_shared()
        barrier()
        part = q_latent._reinterpret(dtype, part_desc.block_type.shape, part_desc.layout)
        tma.async_copy_shared_to_global(part_desc, [row, first_h, 0], part)
        h = first_h + gl.arange(0, BLOCK_H, layout=per_head)
        stats_ptrs = stats_ptr + row.to(gl.int64) * (2 * H) + h
        gl.store(stats_ptrs, m_H, mask=h < H)
        gl.store(stats_ptrs + H, gl.sum(l_HN, 1), mask=h < H)
        if not TOGETHER:
            tma.store_wait(0)
    if TOGETHER:
        combine_here(parts_desc, w_uv_desc, lens_ptr, stats_ptr, out_ptr, arrived_ptr, B, H, V, BLOCK_S, BLOCK_N, PDL)
