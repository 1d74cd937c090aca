"""Linear projections of few tokens: kernels that stream the weights once and are bound by that.

For a token or two, programs of a few output rows hold their weight rows in registers, loaded before the wait for the
kernel ahead. For more tokens and few output rows, tiles go through the tensor cores with the columns split over
programs, the last of which to finish sums the parts in order. What remains is left to the library.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.arrivals import arrivals
from thalweg.ops.triton_launch import pdl_options


@triton.jit
def _columns(ptrs, start: tl.constexpr, cols, D: tl.constexpr, BLOCK_D: tl.constexpr):
    if start + BLOCK_D <= D:
        return tl.load(ptrs + start)
    else:
        return tl.load(ptrs + start, mask=start + cols[None, :] < D, other=0.0)


@triton.jit
def gemv_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    O,
    x_stride,
    w_stride,
    D: tl.constexpr,
    T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,  # chunks of BLOCK_D columns in flight
    SHARE_X: tl.constexpr,  # with one warp: load x once for all rows
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    chunks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    cols = tl.arange(0, BLOCK_D)
    w_ptrs = w_ptr + tl.minimum(rows, O - 1).to(tl.int64)[:, None] * w_stride + cols[None, :]
    # With several warps x is read as a tile shaped like w's, so that each thread loads just what it multiplies.
    if SHARE_X:
        x_ptrs = x_ptr + cols[None, :]
    else:
        x_ptrs = x_ptr + (rows * 0)[:, None] + cols[None, :]
    tiles = ()
    for c in tl.static_range(AHEAD):
        tiles = tiles + (_columns(w_ptrs, c * BLOCK_D, cols, D, BLOCK_D),)
    if PDL:
        gdc_wait()
    sums = ()
    for _ in tl.static_range(T):
        sums = sums + (tl.zeros([BLOCK_O, BLOCK_D], tl.float32),)
    for c in tl.static_range(chunks):
        if c + AHEAD < chunks:
            tiles = tiles + (_columns(w_ptrs, (c + AHEAD) * BLOCK_D, cols, D, BLOCK_D),)
        w = tiles[c].to(tl.float32)
        added = ()
        for t in tl.static_range(T):
            x = _columns(x_ptrs + t * x_stride, c * BLOCK_D, cols, D, BLOCK_D)
            added = added + (sums[t] + w * x.to(tl.float32),)
        sums = added
    for t in tl.static_range(T):
        tl.store(y_ptr + t * O + rows, tl.sum(sums[t], 1).to(y_ptr.dtype.element_ty), mask=rows < O)


@triton.jit
def _tile(row_ptrs, d, index, HERE: tl.constexpr, D: tl.constexpr):
    if HERE:
        return tl.load(row_ptrs + d)
    else:
        return tl.load(row_ptrs + d, mask=d + index < D, other=0.0)


@triton.jit
def tiles_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    partial_ptr,  # [SPLITS, T, O] fp32
    arrivals_ptr,  # one counter for each block of rows, zero before and after
    T,
    O,
    x_stride,
    w_stride,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    block = tl.program_id(0)
    split = tl.program_id(1)
    columns: tl.constexpr = ((D + BLOCK_D - 1) // BLOCK_D + SPLITS - 1) // SPLITS * BLOCK_D  # of a split
    even: tl.constexpr = D == columns * SPLITS
    start = split * columns
    rows = block * BLOCK_O + tl.arange(0, BLOCK_O)
    tokens = tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_D)
    w_ptrs = w_ptr + tl.minimum(rows, O - 1).to(tl.int64)[:, None] * w_stride + cols[None, :]
    x_ptrs = x_ptr + tl.minimum(tokens, T - 1)[None, :] * x_stride + cols[:, None]
    acc = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    if EARLY:
        w = _tile(w_ptrs, start, cols[None, :], even, D)
    if PDL:
        gdc_wait()
    if EARLY:
        acc = tl.dot(w, _tile(x_ptrs, start, cols[:, None], even, D), acc, input_precision="ieee")
    for d in tl.range(BLOCK_D if EARLY else 0, columns, BLOCK_D, num_stages=STAGES):
        w = _tile(w_ptrs, start + d, cols[None, :], even, D)
        acc = tl.dot(w, _tile(x_ptrs, start + d, cols[:, None], even, D), acc, input_precision="ieee")
    here = (rows < O)[:, None] & (tokens < T)[None, :]
    out = tokens[None, :] * O + rows[:, None]
    if SPLITS == 1:
        tl.store(y_ptr + out, acc.to(y_ptr.dtype.element_ty), mask=here)
    else:
        tl.store(partial_ptr + split * T * O + out, acc, mask=here)
        # All threads have stored before the one atomic releases what the program stored; it acquires likewise.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals_ptr + block, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            tl.store(arrivals_ptr + block, 0)
            total = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
            for s in tl.static_range(SPLITS):
                total += tl.load(partial_ptr + s * T * O + out, mask=here, other=0.0, cache_modifier=".cg")
            tl.store(y_ptr + out, total.to(y_ptr.dtype.element_ty), mask=here)


def linear(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    (T, D), O = x_TD.shape, w_OD.shape[0]
    if T == 0 or x_TD.stride(1) != 1 or w_OD.stride(1) != 1:
        return F.linear(x_TD, w_OD)
    y_TO = torch.empty(T, O, dtype=x_TD.dtype, device=x_TD.device)
    # The bounds are measured on an H200: outside them the library's own kernels are as fast or faster.
    if T <= 2 or (T <= 4 and D <= 2560 and O <= 16384):
        if D < 8192:
            run_gemv(x_TD, w_OD, y_TO, block=4, warps=2, depth=256)
        else:
            run_gemv(x_TD, w_OD, y_TO, block=2, warps=4, depth=1024)
    elif T <= 64 and O <= 4096 and D >= 2 * 6 * 128:
        if T <= 16:
            run_tiles(x_TD, w_OD, y_TO, splits=6, stages=3)
        else:
            run_tiles(x_TD, w_OD, y_TO, splits=3, stages=4)
    else:
        return F.linear(x_TD, w_OD)
    return y_TO


def run_gemv(
    x_TD: Tensor, w_OD: Tensor, y_TO: Tensor, block: int = 4, warps: int = 2, depth: int = 256, ahead: int = 9
) -> None:
    (T, D), O = x_TD.shape, w_OD.shape[0]
    gemv_kernel[(triton.cdiv(O, block),)](
        x_TD,
        w_OD,
        y_TO,
        O,
        x_TD.stride(0),
        w_OD.stride(0),
        D=D,
        T=T,
        BLOCK_O=block,
        BLOCK_D=depth,
        AHEAD=min(ahead, triton.cdiv(D, depth)),
        SHARE_X=warps == 1,
        num_warps=warps,
        **pdl_options(x_TD),
    )


def run_tiles(
    x_TD: Tensor,
    w_OD: Tensor,
    y_TO: Tensor,
    splits: int = 1,
    depth: int = 128,
    stages: int = 4,
    early: bool = True,
    block: int = 64,
    warps: int = 4,
) -> None:
    (T, D), O = x_TD.shape, w_OD.shape[0]
    partial = y_TO
    if splits > 1:
        partial = torch.empty(splits, T, O, dtype=torch.float32, device=x_TD.device)
    tiles_kernel[(triton.cdiv(O, block), splits)](
        x_TD,
        w_OD,
        y_TO,
        partial,
        arrivals(x_TD.device),
        T,
        O,
        x_TD.stride(0),
        w_OD.stride(0),
        D=D,
        SPLITS=splits,
        BLOCK_T=max(16, triton.next_power_of_2(T)),
        BLOCK_O=block,
        BLOCK_D=depth,
        STAGES=stages,
        EARLY=early,
        num_warps=warps,
        **pdl_options(x_TD),
    )
