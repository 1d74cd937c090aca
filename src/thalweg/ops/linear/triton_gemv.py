"""Linear projection of one or two tokens, bound by streaming the weights once.

A program takes a few output rows. Their weights are loaded into registers before the wait for the kernel ahead, so
that they arrive while it finishes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.triton_launch import pdl_options

AHEAD = 9  # chunks of columns in flight


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
    residual_ptr,
    y_ptr,
    O,
    x_stride,
    w_stride,
    residual_stride,
    D: tl.constexpr,
    T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,  # chunks of BLOCK_D columns in flight
    ADD: tl.constexpr,
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
    xs, residuals = (), ()
    for c in tl.static_range(AHEAD):
        for t in tl.static_range(T):
            xs = xs + (_columns(x_ptrs + t * x_stride, c * BLOCK_D, cols, D, BLOCK_D),)
    for t in tl.static_range(T):
        if ADD:
            residuals = residuals + (tl.load(residual_ptr + t * residual_stride + rows, mask=rows < O, other=0.0),)
    if O == 0:  # never, but the assembler does not sink loads over a branch: they would wait for one another
        return
    sums = ()
    for _ in tl.static_range(T):
        sums = sums + (tl.zeros([BLOCK_O, BLOCK_D], tl.float32),)
    for c in tl.static_range(chunks):
        if c + AHEAD < chunks:
            tiles = tiles + (_columns(w_ptrs, (c + AHEAD) * BLOCK_D, cols, D, BLOCK_D),)
            for t in tl.static_range(T):
                xs = xs + (_columns(x_ptrs + t * x_stride, (c + AHEAD) * BLOCK_D, cols, D, BLOCK_D),)
        w = tiles[c].to(tl.float32)
        added = ()
        for t in tl.static_range(T):
            added = added + (sums[t] + w * xs[c * T + t].to(tl.float32),)
        sums = added
    for t in tl.static_range(T):
        y = tl.sum(sums[t], 1)
        if ADD:
            y += residuals[t].to(tl.float32)
        tl.store(y_ptr + t * O + rows, y.to(y_ptr.dtype.element_ty), mask=rows < O)


def _tiling(D: int) -> tuple[int, int, int]:
    """(BLOCK_O, BLOCK_D, num_warps). Long rows: fewer of them in a program, and wider chunks. Measured on an H200."""
    return (4, 256, 2) if D < 8192 else (2, 1024, 4)


def gemv(x_TD: Tensor, w_OD: Tensor, residual_TO: Tensor | None = None) -> Tensor:
    """[T, O]: x times w, plus the residual, rounded once."""
    (T, D), O = x_TD.shape, w_OD.shape[0]
    y_TO = torch.empty(T, O, dtype=x_TD.dtype, device=x_TD.device)
    block, depth, warps = _tiling(D)
    gemv_kernel[(triton.cdiv(O, block),)](
        x_TD,
        w_OD,
        y_TO if residual_TO is None else residual_TO,
        y_TO,
        O,
        x_TD.stride(0),
        w_OD.stride(0),
        0 if residual_TO is None else residual_TO.stride(0),
        D=D,
        T=T,
        BLOCK_O=block,
        BLOCK_D=depth,
        AHEAD=min(AHEAD, triton.cdiv(D, depth)),
        ADD=residual_TO is not None,
        num_warps=warps,
        **pdl_options(x_TD),
    )
    return y_TO
