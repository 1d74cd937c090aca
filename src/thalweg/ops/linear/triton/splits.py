"""Projections of some tokens in one launch, in Triton: norm, product and residual, over weights in bf16 or float8.

A program takes rows of the weight for all tokens, and where rows are too few for the multiprocessors a part of the
columns. Parts meet in memory: whoever comes last to a tile adds them up in their order, so bits do not depend on who
that is. A token's 1 / rms is applied to its sums; x times the norm's weight is rounded before that.

Weights are operands of the matrix unit as they come to shared memory. Beside those in float8 x goes to float8 as well,
128 columns of a token with a scale of their own, which sums over these columns take together with the weights'.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.products.triton import LARGEST, SMALLEST
from thalweg.ops.toolchain.counters import counters
from thalweg.ops.toolchain.triton_dot import done, dot
from thalweg.ops.toolchain.triton_launch import pdl_options
from thalweg.ops.toolchain.triton_support import multiprocessors
from thalweg.quant.blocks import BLOCK as _BLOCK

BLOCK = tl.constexpr(_BLOCK)
ROWS = 64  # of a tile


@triton.jit(do_not_specialize=["T"])
def splits_kernel(
    x_ptr,  # [T, D]
    norm_ptr,  # [D], or None
    w_ptr,  # [O, D]
    s_ptr,  # [O, blocks of D], or None
    residual_ptr,  # [T, O], or None
    y_ptr,  # [T, O]
    parts_ptr,  # [tiles, SPLITS, BLOCK_T, BLOCK_O] fp32
    squares_ptr,  # [tiles, SPLITS, BLOCK_T] fp32
    arrived_ptr,  # [tiles], zero between launches
    T,
    O,
    x_stride,
    residual_stride,
    y_stride,
    eps,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    tile, split = tl.program_id(0), tl.program_id(1)
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    STEPS: tl.constexpr = D // BLOCK_D
    first, end = split * STEPS // SPLITS * BLOCK_D, (split + 1) * STEPS // SPLITS * BLOCK_D
    rows = tl.minimum(o, O - 1).to(tl.int64)
    w_ptrs = w_ptr + rows[:, None] * D + d[None, :]
    tokens = tl.minimum(t, T - 1).to(tl.int64)
    square = tl.zeros([BLOCK_T], tl.float32)
    # Scales and the norm's weight, which are not pipelined, a step ahead.
    norm, scale = 0.0, 0.0
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + first + d)
    if s_ptr is not None:
        s_ptrs = s_ptr + rows * (D // BLOCK)
        scale = tl.load(s_ptrs + first // BLOCK)
    if PDL:
        gdc_wait()
    if s_ptr is None:
        x_ptrs = x_ptr + tokens[:, None] * x_stride + d[None, :]
        sums = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
        for at in tl.range(first, end, BLOCK_D, num_stages=STAGES):
            x = tl.load(x_ptrs + at)
            w = tl.load(w_ptrs + at)
            if norm_ptr is not None:
                wide = x.to(tl.float32)
                square += tl.sum(wide * wide, 1)
                x = (wide * norm.to(tl.float32)[None, :]).to(x.dtype)
                norm = tl.load(norm_ptr + tl.minimum(at + BLOCK_D, D - BLOCK_D) + d)
            sums = done(sums + dot(x, tl.trans(w)))
    else:
        x_ptrs = x_ptr + tokens[None, :] * x_stride + d[:, None]
        turned = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
        for at in tl.range(first, end, BLOCK_D, num_stages=STAGES):
            x = tl.load(x_ptrs + at)
            w = tl.load(w_ptrs + at)
            if norm_ptr is not None:
                wide = x.to(tl.float32)
                square += tl.sum(wide * wide, 0)
                x = (wide * norm.to(tl.float32)[:, None]).to(x.dtype)
                norm = tl.load(norm_ptr + tl.minimum(at + BLOCK_D, D - BLOCK_D) + d)
            now = scale
            scale = tl.load(s_ptrs + tl.minimum(at + BLOCK_D, D - BLOCK_D) // BLOCK)
            wide = x.to(tl.float32)
            x_scale = tl.maximum(tl.max(tl.abs(wide), 0), SMALLEST) * (1 / LARGEST)
            turned += dot(w, (wide * (1 / x_scale)[None, :]).to(w.dtype)) * (now[:, None] * x_scale[None, :])
        sums = tl.trans(turned)
    if SPLITS > 1:
        places = t[:, None] * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
        parts_ptr += tile.to(tl.int64) * (SPLITS * BLOCK_T * BLOCK_O)
        squares_ptr += tile * (SPLITS * BLOCK_T)
        tl.store(parts_ptr + split * (BLOCK_T * BLOCK_O) + places, sums)
        if norm_ptr is not None:
            tl.store(squares_ptr + split * BLOCK_T + t, square)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.debug_barrier()
        sums = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
        square = tl.zeros([BLOCK_T], tl.float32)
        for part in tl.static_range(SPLITS):
            sums += tl.load(parts_ptr + part * (BLOCK_T * BLOCK_O) + places, cache_modifier=".cg")
            if norm_ptr is not None:
                square += tl.load(squares_ptr + part * BLOCK_T + t, cache_modifier=".cg")
        tl.store(arrived_ptr + tile, 0)
    if norm_ptr is not None:
        sums *= tl.rsqrt(square / D + eps)[:, None]
    here = (t < T)[:, None] & (o < O)[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + t[:, None].to(tl.int64) * residual_stride + o[None, :]
        sums += tl.load(residual_ptrs, mask=here, other=0.0).to(tl.float32)
    tl.store(y_ptr + t[:, None].to(tl.int64) * y_stride + o[None, :], sums.to(y_ptr.dtype.element_ty), mask=here)


class Tile(NamedTuple):
    """How a product is cut: rows of weights and columns at a time, stages of the pipeline, warps, parts of columns."""

    rows: int
    columns: int
    stages: int
    warps: int
    splits: int


def tile_of(D: int, O: int, float8: bool, processors: int) -> Tile:
    """A program for each multiprocessor, or two over float8, whose steps have half the bytes."""
    splits = max(1, min(D // 512, round((2 if float8 else 1) * processors / triton.cdiv(O, ROWS)), 8))
    if not float8:
        return Tile(ROWS, 64, 8, 4, splits)
    return Tile(ROWS, _BLOCK, 3 if splits > 4 else 4, 4, splits)


def tokens_of(T: int, float8: bool) -> int:
    """Of a tile: all, at least as many as the matrix unit has rows for or, on its other side, columns."""
    return max(16 if float8 else 64, triton.next_power_of_2(T))


def product(
    x_TD: Tensor,
    w_OD: Tensor,
    scale_OB: Tensor | None = None,
    residual_TO: Tensor | None = None,
    out_TO: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """[T, O] = x w^T, of x or its RMSNorm, plus the residual. out_TO has a unit last stride, and is what is returned if
    it is given."""
    (T, D), O, device = x_TD.shape, w_OD.shape[0], x_TD.device
    y_TO = torch.empty(T, O, dtype=x_TD.dtype, device=device) if out_TO is None else out_TO
    if T == 0:
        return y_TO
    cut = tile or tile_of(D, O, scale_OB is not None, multiprocessors(device))
    tokens, tiles = tokens_of(T, scale_OB is not None), triton.cdiv(O, cut.rows)
    parts = squares = arrived = y_TO
    if cut.splits > 1:
        parts = torch.empty(tiles, cut.splits, tokens, cut.rows, dtype=torch.float32, device=device)
        squares = torch.empty(tiles, cut.splits, tokens, dtype=torch.float32, device=device)
        arrived = counters("splits", device, tiles)
    norm_weight_D, eps = norm or (None, 0.0)
    splits_kernel[(tiles, cut.splits)](
        x_TD,
        norm_weight_D,
        w_OD,
        scale_OB,
        residual_TO,
        y_TO,
        parts,
        squares,
        arrived,
        T,
        O,
        x_TD.stride(0),
        0 if residual_TO is None else residual_TO.stride(0),
        y_TO.stride(0),
        eps,
        D=D,
        SPLITS=cut.splits,
        BLOCK_O=cut.rows,
        BLOCK_T=tokens,
        BLOCK_D=cut.columns,
        STAGES=cut.stages,
        num_warps=cut.warps,
        **pdl_options(x_TD),
    )
    return y_TO


def norm_linear(x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_OD: Tensor) -> Tensor:
    return product(x_TD, w_OD, norm=(norm_weight_D, eps))
