"""`combine`: w_uv times the results of all splits of some sequences, a product per head; the sum over a sequence's
splits, weighted, comes after it, where little is left to sum. It is a kernel of its own, or the end of the one whose
programs have the results.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from thalweg.ops.attention.mla_mixer.triton.bulk_copies import (
    arrive_with_results,
    await_results,
    barrier,
    copy,
    gdc_launch_dependents,
    gdc_wait,
)


@gluon.jit
def combine_tile(
    tile_h,
    tile_b,
    programs,
    tiles,
    part_desc,
    w_uv_desc,
    lens_ptr,
    stats_ptr,
    out_ptr,
    arrived_ptr,
    B,
    splits,
    H: gl.constexpr,
    V: gl.constexpr,
    BLOCK_S: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PDL: gl.constexpr,
    TOGETHER: gl.constexpr,
):
    """w_uv times the results of all splits of some sequences, for rows of one head. TOGETHER: as the end of the kernel
    whose programs have these results; those that have no tile here say that theirs are there."""
    dtype: gl.constexpr = part_desc.dtype
    COLUMNS: gl.constexpr = part_desc.block_type.shape[0]  # (sequence, split)
    BLOCK_V: gl.constexpr = w_uv_desc.block_type.shape[1]
    WIDTH: gl.constexpr = w_uv_desc.block_type.shape[2]
    BLOCK_B: gl.constexpr = COLUMNS // BLOCK_S
    WARPS: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    LANES: gl.constexpr = min(BLOCK_S, 32)
    groups: gl.constexpr = gl.BlockedLayout([1, 1], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    rows: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_V, WIDTH], dtype)
    part_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, WIDTH], dtype)
    slices: gl.constexpr = V // BLOCK_V
    h = tile_h // slices
    first_v = tile_h % slices * BLOCK_V
    first_b = tile_b * BLOCK_B
    active = first_b < B

    w_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_V, WIDTH], w_layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(2):
        mbarrier.init(bars.index(j), count=1)
    fence_async_shared()
    if TOGETHER:
        barrier()
    for j in gl.static_range(2):
        mbarrier.expect(bars.index(j), w_uv_desc.block_type.nbytes + part_desc.block_type.nbytes, pred=active)
        copy(w_uv_desc, h, first_v, j * WIDTH, bars.index(j), w_smem.index(j), active)
    if TOGETHER:
        arrive_with_results(arrived_ptr)
    if active:
        b = first_b + gl.arange(0, BLOCK_B, layout=gl.SliceLayout(1, groups))
        s = gl.arange(0, BLOCK_S, layout=gl.SliceLayout(0, groups))
        tiles_B = gl.cdiv(gl.load(lens_ptr + b, mask=b < B, other=0), BLOCK_N)
        span_B = gl.maximum(gl.cdiv(tiles_B, splits), 1)
        used_BS = s[None, :] * span_B[:, None] < tiles_B[:, None]
        stats_ptrs = stats_ptr + (b.to(gl.int64)[:, None] * BLOCK_S + s[None, :]) * (2 * H) + h
        if TOGETHER:
            await_results(arrived_ptr, programs, tiles)
        elif PDL:
            gdc_wait()
        part_smem = gl.allocate_shared_memory(dtype, [2, COLUMNS, WIDTH], part_layout)
        for j in gl.static_range(2):
            copy(part_desc, first_b * BLOCK_S, h, j * WIDTH, bars.index(j), part_smem.index(j), True)
        m_BS = gl.load(stats_ptrs, mask=used_BS, other=float("-inf"), cache_modifier=".cg")
        l_BS = gl.load(stats_ptrs + H, mask=used_BS, other=0.0, cache_modifier=".cg")
        # A finite fill for sequences without tokens, whose weights come out as zeros.
        weight_BS = gl.exp2(m_BS - gl.maximum(gl.max(m_BS, 1), -1e30)[:, None])
        weight_BS = weight_BS / gl.maximum(gl.sum(weight_BS * l_BS, 1), 1e-30)[:, None]
        weight_N = gl.convert_layout(gl.reshape(weight_BS, [COLUMNS]), gl.SliceLayout(0, mma))
        out_VN = gl.zeros([BLOCK_V, COLUMNS], gl.float32, layout=mma)
        for j in gl.static_range(2):
            mbarrier.wait(bars.index(j), 0)
            out_VN = warpgroup_mma(
                w_smem.index(j), part_smem.index(j).permute((1, 0)), out_VN, use_acc=j > 0, is_async=True
            )
        out_VN = warpgroup_mma_wait(0, deps=(out_VN,))
        # Columns of unused splits hold whatever was there, NaN included.
        out_VN = gl.where((weight_N > 0)[None, :], out_VN * weight_N[None, :], 0.0)
        out_VB = gl.sum(gl.reshape(out_VN, [BLOCK_V, BLOCK_B, BLOCK_S]), 2)
        out_BV = gl.convert_layout(gl.permute(out_VB, (1, 0)), rows)
        b = first_b + gl.arange(0, BLOCK_B, layout=gl.SliceLayout(1, rows))
        v = first_v + gl.arange(0, BLOCK_V, layout=gl.SliceLayout(0, rows))
        out_ptrs = out_ptr + (b.to(gl.int64)[:, None] * H + h) * V + v[None, :]
        gl.store(out_ptrs, out_BV.to(dtype), mask=b[:, None] < B)


@gluon.jit
def combine_here(
    parts_desc,
    w_uv_desc,
    lens_ptr,
    stats_ptr,
    out_ptr,
    arrived_ptr,
    B,
    H: gl.constexpr,
    V: gl.constexpr,
    BLOCK_S: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PDL: gl.constexpr,
):
    programs = gl.num_programs(0) * gl.num_programs(1) * gl.num_programs(2)
    program = (gl.program_id(2) * gl.num_programs(1) + gl.program_id(1)) * gl.num_programs(0) + gl.program_id(0)
    ROWS: gl.constexpr = H * (V // w_uv_desc.block_type.shape[1])
    tiles = ROWS * gl.cdiv(B * BLOCK_S, parts_desc.block_type.shape[0])
    combine_tile(
        program % ROWS,
        program // ROWS,
        programs,
        tiles,
        parts_desc,
        w_uv_desc,
        lens_ptr,
        stats_ptr,
        out_ptr,
        arrived_ptr,
        B,
        gl.num_programs(0),
        H,
        V,
        BLOCK_S,
        BLOCK_N,
        PDL,
        True,
    )


@gluon.jit(do_not_specialize=["B", "splits"])
def combine(
    part_desc,
    w_uv_desc,
    lens_ptr,
    stats_ptr,
    out_ptr,
    B,
    splits,
    H: gl.constexpr,
    V: gl.constexpr,
    BLOCK_S: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    combine_tile(
        gl.program_id(0),
        gl.program_id(1),
        0,
        0,
        part_desc,
        w_uv_desc,
        lens_ptr,
        stats_ptr,
        out_ptr,
        stats_ptr,
        B,
        splits,
        H,
        V,
        BLOCK_S,
        BLOCK_N,
        PDL,
        False,
    )
