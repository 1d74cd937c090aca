"""Linear projection of a few tokens, bound by streaming the weights once.

A program takes a few output rows and all columns, which its warps share out. Weights go from memory into the registers
that the tensor cores read, 16 bytes a thread and without a detour through shared memory: a sum has no order, so that a
thread's 8 consecutive columns may stand in the places where the instruction expects others, for x and w alike. The
first of them are loaded before the wait for the kernel ahead, and arrive while it finishes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.triton_dot import dot
from thalweg.ops.triton_launch import pdl_options


@triton.jit
def _columns(ptrs, start: tl.constexpr, columns, D: tl.constexpr, STEP: tl.constexpr):
    if start + STEP <= D:
        return tl.load(ptrs + start)
    else:
        return tl.load(ptrs + start, mask=start + columns < D, other=0.0)


@triton.jit
def _rows(ptrs, start: tl.constexpr, columns, here, D: tl.constexpr, STEP: tl.constexpr):
    if start + STEP <= D:
        return tl.load(ptrs + start, mask=here, other=0.0)
    else:
        return tl.load(ptrs + start, mask=here & (start + columns < D), other=0.0)


@triton.jit
def _fragment(tile, SPLIT: tl.constexpr):
    """[8, SPLIT, 32] as [SPLIT, 8, 32], columns reordered within the 32: each thread keeps the 8 that it loaded."""
    tile = tl.reshape(tile, [8, SPLIT, 4, 2, 4])
    return tl.reshape(tl.permute(tile, (1, 0, 3, 2, 4)), [SPLIT, 8, 32])


@triton.jit(do_not_specialize=["T"])
def few_tokens_kernel(
    x_ptr,
    norm_ptr,
    w_ptr,
    residual_ptr,
    y_ptr,
    normed_ptr,
    T,
    O,
    x_stride,
    w_stride,
    residual_stride,
    eps,
    D: tl.constexpr,
    TILES: tl.constexpr,  # of 8 tokens
    BLOCKS: tl.constexpr,  # of 8 output rows
    SPLIT: tl.constexpr,  # parts of the columns, a warp each
    AHEAD: tl.constexpr,  # chunks of 32 * SPLIT columns in flight
    NORM: tl.constexpr,
    STORE: tl.constexpr,  # the norm too
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    step: tl.constexpr = SPLIT * 32
    chunks: tl.constexpr = (D + step - 1) // step
    pairs: tl.constexpr = (TILES + 1) // 2
    columns = tl.arange(0, SPLIT)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    first = tl.program_id(0) * (8 * BLOCKS)
    eight = tl.arange(0, 8)[:, None, None]
    tiles = ()
    norm_weights = ()
    for c in tl.static_range(AHEAD):
        if NORM:
            norm_weights = norm_weights + (_columns(norm_ptr + eight * 0 + columns, c * step, columns, D, step),)
        for o in tl.static_range(BLOCKS):
            w_ptrs = w_ptr + tl.minimum(first + o * 8 + eight, O - 1).to(tl.int64) * w_stride + columns
            tiles = tiles + (_columns(w_ptrs, c * step, columns, D, step),)
    if PDL:
        gdc_wait()
    x_ptrs = x_ptr + eight.to(tl.int64) * x_stride + columns
    xs = ()
    for c in tl.static_range(AHEAD):
        for t in tl.static_range(TILES):
            xs = xs + (_rows(x_ptrs + t * 8 * x_stride, c * step, columns, t * 8 + eight < T, D, step),)
    if T == 0:  # never, but the assembler does not sink loads over a branch: they would wait for one another
        return
    scales = ()
    if NORM:
        tl.static_assert(AHEAD == chunks, "a norm needs all columns at once")
        for t in tl.static_range(TILES):
            squares = tl.zeros([8, SPLIT, 32], tl.float32)
            for c in tl.static_range(chunks):
                x = xs[c * TILES + t].to(tl.float32)
                squares += x * x
            scales = scales + (tl.rsqrt(tl.sum(tl.sum(squares, 2), 1) / D + eps)[:, None, None],)
    accs = ()
    for _ in tl.static_range(pairs * BLOCKS):
        accs = accs + (tl.zeros([SPLIT, 16, 8], tl.float32),)
    for c in tl.static_range(chunks):
        if c + AHEAD < chunks:
            for o in tl.static_range(BLOCKS):
                w_ptrs = w_ptr + tl.minimum(first + o * 8 + eight, O - 1).to(tl.int64) * w_stride + columns
                tiles = tiles + (_columns(w_ptrs, (c + AHEAD) * step, columns, D, step),)
            for t in tl.static_range(TILES):
                here = t * 8 + eight < T
                xs = xs + (_rows(x_ptrs + t * 8 * x_stride, (c + AHEAD) * step, columns, here, D, step),)
        halves = ()
        for t in tl.static_range(TILES):
            x = xs[c * TILES + t]
            if NORM:
                x = (x.to(tl.float32) * scales[t] * norm_weights[c].to(tl.float32)).to(x.dtype)
                if STORE:
                    if tl.program_id(0) == c % tl.num_programs(0):
                        out_ptrs = normed_ptr + (t * 8 + eight).to(tl.int64) * D + c * step + columns
                        tl.store(out_ptrs, x, mask=(t * 8 + eight < T) & (c * step + columns < D))
            halves = halves + (_fragment(x, SPLIT),)
        if TILES % 2:
            halves = halves + (tl.zeros([SPLIT, 8, 32], x_ptr.dtype.element_ty),)
        added = ()
        for p in tl.static_range(pairs):
            x16 = tl.permute(tl.join(halves[2 * p], halves[2 * p + 1]), (0, 3, 1, 2))
            for o in tl.static_range(BLOCKS):
                w = tl.permute(_fragment(tiles[c * BLOCKS + o], SPLIT), (0, 2, 1))
                added = added + (accs[p * BLOCKS + o] + dot(tl.reshape(x16, [SPLIT, 16, 32]), w),)
        accs = added
    for p in tl.static_range(pairs):
        for o in tl.static_range(BLOCKS):
            tokens = p * 16 + tl.arange(0, 16)
            rows = first + o * 8 + tl.arange(0, 8)
            here = (tokens < T)[:, None] & (rows < O)[None, :]
            y = tl.sum(accs[p * BLOCKS + o], 0)
            if ADD:
                residual_ptrs = residual_ptr + tokens[:, None].to(tl.int64) * residual_stride + rows[None, :]
                y += tl.load(residual_ptrs, mask=here, other=0.0).to(tl.float32)
            tl.store(y_ptr + tokens[:, None].to(tl.int64) * O + rows[None, :], y.to(y_ptr.dtype.element_ty), mask=here)


def norm_fits(D: int) -> bool:
    """Whether few_tokens by its defaults holds all of a row at once."""
    return D <= 32 * 8 * 9


def few_tokens(
    x_TD: Tensor,
    w_OD: Tensor,
    norm: tuple[Tensor, float] | None = None,
    residual_TO: Tensor | None = None,
    dtype: torch.dtype | None = None,
    normed_TD: Tensor | None = None,
    blocks: int = 2,
    split: int = 8,
    ahead: int = 9,
    maxnreg: int | None = None,
) -> Tensor:
    """[T, O] in `dtype` (x's): x, or its RMSNorm of (weight_D, eps), times w, plus the residual. The norm is stored in
    normed_TD where that is given."""
    (T, D), O = x_TD.shape, w_OD.shape[0]
    y_TO = torch.empty(T, O, dtype=dtype or x_TD.dtype, device=x_TD.device)
    norm_weight_D, eps = norm or (w_OD, 0.0)
    few_tokens_kernel[(triton.cdiv(O, 8 * blocks),)](
        x_TD,
        norm_weight_D,
        w_OD,
        x_TD if residual_TO is None else residual_TO,
        y_TO,
        y_TO if normed_TD is None else normed_TD,
        T,
        O,
        x_TD.stride(0),
        w_OD.stride(0),
        0 if residual_TO is None else residual_TO.stride(0),
        eps,
        D=D,
        TILES=triton.cdiv(T, 8),
        BLOCKS=blocks,
        SPLIT=split,
        AHEAD=min(ahead, triton.cdiv(D, 32 * split)),
        NORM=norm is not None,
        STORE=normed_TD is not None,
        ADD=residual_TO is not None,
        num_warps=split,
        maxnreg=maxnreg,
        **pdl_options(x_TD),
    )
    return y_TO
