"""Linear projection of one or two tokens, bound by streaming the weights once.

A program takes a few output rows. Their weights are loaded into registers before the wait for the kernel ahead, so
that they arrive while it finishes. For more tokens the library's kernels are as fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.triton_launch import pdl_options

MAX_TOKENS = 2


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
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    chunks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    cols = tl.arange(0, BLOCK_D)
    w_ptrs = w_ptr + tl.minimum(rows, O - 1).to(tl.int64)[:, None] * w_stride + cols[None, :]
    # x is read as a tile shaped like w's, so that each thread loads just what it multiplies.
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


def linear(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    (T, D), O = x_TD.shape, w_OD.shape[0]
    if not 0 < T <= MAX_TOKENS or x_TD.stride(1) != 1 or w_OD.stride(1) != 1:
        return F.linear(x_TD, w_OD)
    y_TO = torch.empty(T, O, dtype=x_TD.dtype, device=x_TD.device)
    # Long rows: fewer of them in a program, and wider chunks. Measured on an H200.
    block, warps, depth = (4, 2, 256) if D < 8192 else (2, 4, 1024)
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
        AHEAD=min(9, triton.cdiv(D, depth)),
        num_warps=warps,
        **pdl_options(x_TD),
    )
    return y_TO
