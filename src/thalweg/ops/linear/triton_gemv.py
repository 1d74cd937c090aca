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
    norm_ptr,
    w_ptr,
    residual_ptr,
    y_ptr,
    O,
    x_stride,
    w_stride,
    residual_stride,
    eps,
    D: tl.constexpr,
    T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,  # chunks of BLOCK_D columns in flight
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    chunks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    cols = tl.arange(0, BLOCK_D)
    w_ptrs = w_ptr + tl.minimum(rows, O - 1).to(tl.int64)[:, None] * w_stride + cols[None, :]
    # x and the norm's weight are read as tiles shaped like w's, so that each thread loads just what it multiplies.
    x_ptrs = x_ptr + (rows * 0)[:, None] + cols[None, :]
    norm_ptrs = norm_ptr + (rows * 0)[:, None] + cols[None, :]
    tiles, norm_weights = (), ()
    for c in tl.static_range(AHEAD):
        tiles = tiles + (_columns(w_ptrs, c * BLOCK_D, cols, D, BLOCK_D),)
        if NORM:
            norm_weights = norm_weights + (_columns(norm_ptrs, c * BLOCK_D, cols, D, BLOCK_D),)
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
    scales, sums = (), ()
    for t in tl.static_range(T):
        if NORM:
            tl.static_assert(AHEAD == chunks, "a norm needs all columns at once")
            squares = tl.zeros([BLOCK_O, BLOCK_D], tl.float32)
            for c in tl.static_range(chunks):
                squares += xs[c * T + t].to(tl.float32) * xs[c * T + t].to(tl.float32)
            scales = scales + (tl.rsqrt(tl.sum(squares, 1) / D + eps)[:, None],)
        sums = sums + (tl.zeros([BLOCK_O, BLOCK_D], tl.float32),)
    for c in tl.static_range(chunks):
        if c + AHEAD < chunks:
            tiles = tiles + (_columns(w_ptrs, (c + AHEAD) * BLOCK_D, cols, D, BLOCK_D),)
            for t in tl.static_range(T):
                xs = xs + (_columns(x_ptrs + t * x_stride, (c + AHEAD) * BLOCK_D, cols, D, BLOCK_D),)
        w = tiles[c].to(tl.float32)
        added = ()
        for t in tl.static_range(T):
            x = xs[c * T + t]
            if NORM:
                x = (x.to(tl.float32) * scales[t] * norm_weights[c].to(tl.float32)).to(x.dtype)
            added = added + (sums[t] + w * x.to(tl.float32),)
        sums = added
    for t in tl.static_range(T):
        y = tl.sum(sums[t], 1)
        if ADD:
            y += residuals[t].to(tl.float32)
        tl.store(y_ptr + t * O + rows, y.to(y_ptr.dtype.element_ty), mask=rows < O)


def _tiling(D: int) -> tuple[int, int, int]:
    """(BLOCK_O, BLOCK_D, num_warps). Long rows: fewer of them in a program, and wider chunks. Measured on an H200."""
    return (4, 256, 2) if D < 8192 else (2, 1024, 4)


def norm_fits(D: int) -> bool:
    return triton.cdiv(D, _tiling(D)[1]) <= AHEAD


def gemv(
    x_TD: Tensor, w_OD: Tensor, norm: tuple[Tensor, float] | None = None, residual_TO: Tensor | None = None
) -> Tensor:
    """[T, O]: x, or its RMSNorm of (weight_D, eps) where norm_fits(D), times w, plus the residual, rounded once."""
    (T, D), O = x_TD.shape, w_OD.shape[0]
    y_TO = torch.empty(T, O, dtype=x_TD.dtype, device=x_TD.device)
    norm_weight_D, eps = norm or (w_OD, 0.0)
    block, depth, warps = _tiling(D)
    gemv_kernel[(triton.cdiv(O, block),)](
        x_TD,
        norm_weight_D,
        w_OD,
        y_TO if residual_TO is None else residual_TO,
        y_TO,
        O,
        x_TD.stride(0),
        w_OD.stride(0),
        0 if residual_TO is None else residual_TO.stride(0),
        eps,
        D=D,
        T=T,
        BLOCK_O=block,
        BLOCK_D=depth,
        AHEAD=min(AHEAD, triton.cdiv(D, depth)),
        NORM=norm is not None,
        ADD=residual_TO is not None,
        num_warps=warps,
        **pdl_options(x_TD),
    )
    return y_TO
