"""Products with matrices in float8 for any number of tokens, in Triton: tiles are widened in registers.

From e4m3 to fp16 there is one instruction for two elements; so x goes to fp16, in a launch of its own, which is that of
the norm if there is one: each row is scaled by a power of two to just below fp16's largest, and loses nothing but what
is below 2^-29 of its largest element. The weights are the left operand, which the matrix unit takes from registers:
what is widened goes to it straight away, and a tile of y is computed transposed.

Scales go to sums over 128 columns; or, FOLD, to a weight as it is widened, so that sums run through all columns in one
accumulator. It then takes the scale over the largest one of its row, in fp16, and the sums take that. Where tiles are
too few for the multiprocessors, columns are split, and one more launch adds the parts in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.linear.fp8.by_product import linears_by
from thalweg.ops.toolchain.triton_dot import done
from thalweg.ops.toolchain.triton_launch import pdl_options
from thalweg.ops.toolchain.triton_support import multiprocessors
from thalweg.quant.blocks import BLOCK as _BLOCK

BLOCK = tl.constexpr(_BLOCK)
LARGEST_SCALE = tl.constexpr(2.0**126)  # of which the inverse is a normal number


@triton.jit(do_not_specialize=["T"])
def half_kernel(
    x_ptr,
    norm_ptr,  # [D], or None
    half_ptr,  # [T, D] fp16
    x_scale_ptr,  # [T] fp32
    s_ptr,  # [O, blocks of D], or None
    largest_ptr,  # [2, O] fp32
    T,
    O,
    x_stride,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row of x, or of its RMSNorm, in fp16, times a power of two, and the inverse of that. Programs beyond those of T
    rows: of ROWS rows of weights the largest scale, and its inverse."""
    if PDL:
        gdc_launch_dependents()
    if tl.program_id(0) >= T:
        if PDL:
            gdc_wait()
        blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
        o = (tl.program_id(0) - T) * ROWS + tl.arange(0, ROWS)
        some = tl.arange(0, 16)
        scales = tl.zeros([ROWS, 16], tl.float32)
        for c in tl.static_range(0, blocks, 16):
            here = (o < O)[:, None] & (c + some < blocks)[None, :]
            more = tl.load(s_ptr + o[:, None].to(tl.int64) * blocks + c + some[None, :], mask=here, other=0.0)
            scales = tl.maximum(scales, more)
        largest = tl.minimum(tl.maximum(tl.max(scales, 1), 1 / LARGEST_SCALE), LARGEST_SCALE)
        tl.store(largest_ptr + o, largest, mask=o < O)
        tl.store(largest_ptr + O + o, tl.div_rn(1.0, largest), mask=o < O)
        return
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + d, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + token * x_stride + d, mask=inside, other=0.0)
    if norm_ptr is not None:
        wide = x.to(tl.float32)
        x = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / D + eps) * norm).to(x.dtype)
    wide = x.to(tl.float32)
    # The powers of two are put together from their bits: the largest lands in [2^14, 2^15), and NaN stays NaN.
    exponent = tl.max(tl.abs(wide), 0).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 15), 253)
    wide *= ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(half_ptr + token * D + d, wide.to(tl.float16), mask=inside)
    tl.store(x_scale_ptr + token, ((exponent - 14) << 23).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["T"])
def tiles_kernel(
    x_ptr,  # [T, D] fp16
    x_scale_ptr,  # [T]
    q_ptr,  # [O, D]
    s_ptr,  # [O, blocks of D]
    largest_ptr,  # [2, O], the largest scale of a row and its inverse; FOLD alone reads it
    residual_ptr,  # [T, O], or None
    y_ptr,  # [T, O], or [splits, T, O] in fp32
    T,
    D,  # a multiple of BLOCK_D
    O,
    residual_stride,
    y_stride,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,  # divides BLOCK; without FOLD the same, if that divides D
    FOLD: tl.constexpr,
    GROUP: tl.constexpr,  # tiles of tokens that share the weights they read
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    split, splits = tl.program_id(1), tl.num_programs(1)
    program, tiles_o, tiles_t = tl.program_id(0), tl.cdiv(O, BLOCK_O), tl.cdiv(T, BLOCK_T)
    group = program // (GROUP * tiles_o)
    width = tl.minimum(tiles_t - group * GROUP, GROUP)
    within = program - group * GROUP * tiles_o
    tile_t, tile_o = group * GROUP + within % width, within // width
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    rows = tl.minimum(o, O - 1).to(tl.int64)
    blocks = tl.cdiv(D, BLOCK)
    first, end = split * blocks // splits * BLOCK, tl.minimum((split + 1) * blocks // splits * BLOCK, D)
    q_ptrs = q_ptr + rows[:, None] * D + d[None, :]
    s_ptrs = s_ptr + rows * blocks
    x_ptrs = x_ptr + tl.minimum(t, T - 1)[None, :].to(tl.int64) * D + d[:, None]
    if PDL:
        gdc_wait()
    acc = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for at in tl.range(first, end, BLOCK_D, num_stages=STAGES):
        q = tl.load(q_ptrs + at).to(tl.float16)
        x = tl.load(x_ptrs + at)
        scale = tl.load(s_ptrs + at // BLOCK)
        if FOLD:
            # Loaded in the loop, or Triton would not widen where the matrix unit wants it.
            scale *= tl.load(largest_ptr + O + rows)
            acc = done(tl.dot(q * scale.to(tl.float16)[:, None], x, acc))
        else:
            acc += tl.dot(q, x) * scale[:, None]
    x_scale = tl.load(x_scale_ptr + t, mask=t < T, other=0.0)
    acc *= x_scale[None, :]
    if FOLD:
        acc *= tl.load(largest_ptr + rows)[:, None]
    y = tl.trans(acc)
    here = (t < T)[:, None] & (o < O)[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + t[:, None].to(tl.int64) * residual_stride + o[None, :], mask=here, other=0.0)
    y_ptr += split.to(tl.int64) * T * O  # if there are parts
    tl.store(y_ptr + t[:, None].to(tl.int64) * y_stride + o[None, :], y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["T"])
def sum_kernel(
    parts_ptr,  # [SPLITS, T, O] fp32
    residual_ptr,  # [T, O], or None
    y_ptr,  # [T, O]
    T,
    O,
    residual_stride,
    y_stride,
    SPLITS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    blocks = tl.cdiv(O, BLOCK_O)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    y = tl.zeros([BLOCK_O], tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(parts_ptr + (split * T + t) * O + o, mask=o < O, other=0.0)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + t * residual_stride + o, mask=o < O, other=0.0)
    tl.store(y_ptr + t * y_stride + o, y.to(y_ptr.dtype.element_ty), mask=o < O)


class Tile(NamedTuple):
    """How a product is cut: rows of weights, tokens and columns at a time, stages of the pipeline, warps, whether
    weights take their scales, parts that the columns are split into, tiles of tokens that go together."""

    rows: int
    tokens: int
    columns: int
    stages: int
    warps: int
    fold: bool = False
    splits: int = 1
    group: int = 8


def tile_of(T: int, D: int, O: int, processors: int) -> Tile:
    """Two tiles or, of few tokens, three fit a multiprocessor; columns are split until so many are there."""
    depth = BLOCK.value if D % BLOCK.value == 0 else BLOCK.value // 2  # a rank may have half a block
    if T <= 64:
        tile = Tile(64, 16 if T <= 16 else 32 if T <= 32 else 64, depth, 3 if T <= 32 else 4, 4)
    elif T <= 512 or depth < BLOCK.value:
        tile = Tile(64, 128, depth, 3, 4)
    else:
        tile = Tile(64, 256, 64, 3, 4, fold=True)
    tiles = triton.cdiv(O, tile.rows) * triton.cdiv(T, tile.tokens)
    wanted = processors * (3.3 if T <= 32 else 2)
    return tile._replace(splits=max(1, min(round(wanted / tiles), D // 512, 8)))


def product(
    x_TD: Tensor,
    q_OD: Tensor,
    scale_OB: Tensor,
    residual_TO: Tensor | None = None,
    out_TO: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """[T, O] = x w^T, of x or its RMSNorm, plus the residual. out_TO has a unit last stride, and is what is returned if
    it is given."""
    (T, D), O = x_TD.shape, q_OD.shape[0]
    y_TO = torch.empty(T, O, dtype=x_TD.dtype, device=x_TD.device) if out_TO is None else out_TO
    if T == 0:
        return y_TO
    tile = tile or tile_of(T, D, O, multiprocessors(x_TD.device))
    residual_stride = 0 if residual_TO is None else residual_TO.stride(0)
    parts, whole = y_TO, tile.splits == 1
    if not whole:
        parts = torch.empty(tile.splits, T, O, dtype=torch.float32, device=x_TD.device)
    half_TD = torch.empty(T, D, dtype=torch.float16, device=x_TD.device)
    x_scale_T = torch.empty(T, dtype=torch.float32, device=x_TD.device)
    largest_2O = torch.empty(2, O, dtype=torch.float32, device=x_TD.device) if tile.fold else x_scale_T
    norm_weight_D, eps = norm or (None, 0.0)
    block, rows = triton.next_power_of_2(D), 32
    half_kernel[(T + (triton.cdiv(O, rows) if tile.fold else 0),)](
        x_TD,
        norm_weight_D,
        half_TD,
        x_scale_T,
        scale_OB,
        largest_2O,
        T,
        O,
        x_TD.stride(0),
        eps,
        D=D,
        BLOCK_D=block,
        ROWS=rows,
        num_warps=min(8, max(1, block // 512)),
        **pdl_options(x_TD),
    )
    tiles_kernel[(triton.cdiv(O, tile.rows) * triton.cdiv(T, tile.tokens), tile.splits)](
        half_TD,
        x_scale_T,
        q_OD,
        scale_OB,
        largest_2O,
        residual_TO if whole else None,
        parts,
        T,
        D,
        O,
        residual_stride,
        y_TO.stride(0) if whole else O,
        BLOCK_O=tile.rows,
        BLOCK_T=tile.tokens,
        BLOCK_D=tile.columns,
        FOLD=tile.fold,
        GROUP=tile.group,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **pdl_options(x_TD),
    )
    if not whole:
        block = 512
        sum_kernel[(T * triton.cdiv(O, block),)](
            parts,
            residual_TO,
            y_TO,
            T,
            O,
            residual_stride,
            y_TO.stride(0),
            SPLITS=tile.splits,
            BLOCK_O=block,
            num_warps=4,
            **pdl_options(x_TD),
        )
    return y_TO


linear_fp8, norm_linear_fp8, linear_add_fp8 = linears_by(product)
