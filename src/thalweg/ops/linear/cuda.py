"""Linear projections of a few tokens in CUDA C++, over bf16 and float8 (stream.cu says how they work).

The library cannot load weights before the kernel ahead is done, which matters while a projection takes microseconds.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from thalweg.ops.toolchain.cuda_build import aligned_rows, cuda_kernel
from thalweg.ops.toolchain.triton_support import multiprocessors
from thalweg.quant.blocks import BLOCK

SOURCE = Path(__file__).with_name("stream.cu")
WARPS, MAX_STAGES = 8, 16  # the latter as in the source
SHARED = 220 * 1024  # bytes of shared memory that a block may ask for
ROW_GROUP = 8  # rows of float8 that are dealt out together, so that their scales are copied 16 bytes at a time
GRANULE = 512  # columns whose scales of a row are 16 bytes


class Tiling(NamedTuple):
    """How a block goes through its rows and columns: passes of `columns`, each over tiles of `tile_rows` rows, computed
    `rows` at a time, through a ring of `stages` tiles."""

    columns: int
    rows: int
    tile_rows: int
    stages: int
    shared_bytes: int


def linear(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    return stream(x_TD, w_OD)


def norm_linear(x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_OD: Tensor) -> Tensor:
    return stream(x_TD, w_OD, norm=(norm_weight_D, eps))


def linear_add(x_TD: Tensor, w_OD: Tensor, residual_TO: Tensor) -> Tensor:
    return stream(x_TD, w_OD, residual_TO=residual_TO)


def tiling(block_rows: int, D: int, tokens: int, *, fp8: bool, norm_bytes: int = 0) -> Tiling:
    """For blocks of at most `block_rows` rows; norm_bytes: of an element of the norm's weight, if there is one.

    A pass has as many columns as registers hold of x, or of wide bf16 as many as leave room for a ring of larger tiles.
    A tile has 16 rows, or all of a block's if these are few, or 8 of very long ones. Both shrink until two tiles fit.
    """
    few = block_rows <= 24 and tokens <= 16
    if fp8:
        most, granule = {8: 5120, 16: 4096, 32: 2048}[tokens], GRANULE
    else:
        most, granule = 4096 if D <= 4096 and (tokens == 8 or few) else 2304, 256
    passes = -(-D // most)
    while True:
        columns = D if passes == 1 else -(-D // passes // granule) * granule
        long = columns > (4096 if fp8 else 2304) or tokens == 32
        for rows in (24 if few and not fp8 else 8 if long else 16, 8):
            cut = _ring(block_rows, D, tokens, columns, rows, fp8, norm_bytes)
            if cut.stages >= 2 or (cut.stages == 1 and passes == 1 and block_rows <= cut.tile_rows):
                return cut
        passes += 1


def _ring(block_rows: int, D: int, tokens: int, columns: int, rows: int, fp8: bool, norm_bytes: int) -> Tiling:
    passes, tile_rows = -(-D // columns), min(block_rows, rows)
    row_bytes = columns * (1 if fp8 else 2)
    row_bytes += (0 if row_bytes % 128 else 64) + (columns // BLOCK * 4 if fp8 else 0)
    tiles = -(-block_rows // tile_rows)
    sums = 4 * tokens * rows * (2 * WARPS + (tiles if passes > 1 else 0))
    fixed = -(-norm_bytes * D // 128) * 128 + sums
    stages = min(passes * tiles, max(0, SHARED - fixed) // (tile_rows * row_bytes), MAX_STAGES)
    return Tiling(columns, rows, tile_rows, stages, fixed + stages * tile_rows * row_bytes)


def stream(
    x_TD: Tensor,
    w_OD: Tensor,
    scale_OB: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual_TO: Tensor | None = None,
    out_TO: Tensor | None = None,
) -> Tensor:
    """[T, O] of at most 32 tokens: x, or its RMSNorm of (weight_D, eps), times w, plus the residual, rounded once.

    w is bf16, or float8 with its scales. out_TO has a unit last stride, and is what is returned if it is given.
    """
    (T, D), O, fp8 = x_TD.shape, w_OD.shape[0], scale_OB is not None
    y_TO = torch.empty(T, O, dtype=x_TD.dtype, device=x_TD.device) if out_TO is None else out_TO
    if T == 0:
        return y_TO
    x_TD = aligned_rows(x_TD)
    group = ROW_GROUP if fp8 else 1
    blocks = min(multiprocessors(x_TD.device), O // group)
    tokens = next(n for n in (8, 16, 32) if n >= T)
    norm_weight_D, eps = norm or (x_TD, 0.0)
    norm_bytes = 0 if norm is None else norm_weight_D.element_size()
    cut = tiling(group * -(-O // group // blocks), D, tokens, fp8=fp8, norm_bytes=norm_bytes)
    macros = dict(D=D, PASS=cut.columns, FP8=int(fp8), WARPS=WARPS, TOKENS=tokens, ROWS=cut.rows)
    macros |= dict(NORM=norm_bytes // 2, ADD=int(residual_TO is not None))
    cuda_kernel(SOURCE, "stream", 32 * WARPS, x_TD.device, **macros).launch(
        (blocks, 1, 1),
        cut.shared_bytes,
        x_TD,
        norm_weight_D,
        w_OD,
        w_OD if scale_OB is None else scale_OB,
        x_TD if residual_TO is None else residual_TO,
        y_TO,
        (c_longlong, x_TD.stride(0)),
        (c_longlong, 0 if residual_TO is None else residual_TO.stride(0)),
        (c_longlong, y_TO.stride(0)),
        (c_int, T),
        (c_int, O),
        (c_int, cut.tile_rows),
        (c_int, cut.stages),
        (c_float, eps),
    )
    return y_TO
