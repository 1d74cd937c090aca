"""Linear projections of a few tokens in CUDA C++ (few.cu says how they work).

The library cannot load weights before the kernel ahead is done, which matters while a projection takes microseconds.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thalweg.errors import KernelError
from thalweg.ops.all_reduce import AREAS, SUMS, Ranks
from thalweg.ops.all_reduce.cuda import exchange_arguments
from thalweg.ops.norm import NextNorm
from thalweg.ops.registry import Refusal
from thalweg.ops.toolchain.cuda_build import aligned_rows, cuda_kernel
from thalweg.ops.toolchain.triton_support import multiprocessors

SOURCE = Path(__file__).with_name("few.cu")
WARPS, MAX_STAGES = 8, 16  # the latter as in the source
SHARED = 220 * 1024  # bytes of shared memory that a block may ask for
TOKENS = (8, 16, 32)  # that kernels are made for
GRANULE = 256  # columns that passes are multiples of


class Tiling(NamedTuple):
    """How a block goes through its rows and columns: passes of `columns`, each over tiles of `tile_rows` rows, computed
    `rows` at a time, through a ring of `stages` tiles."""

    columns: int
    rows: int
    tile_rows: int
    stages: int
    shared_bytes: int


def linear(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    return few_tokens(x_TD, w_OD)


def norm_linear(x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_OD: Tensor) -> Tensor:
    return few_tokens(x_TD, w_OD, norm=(norm_weight_D, eps))


def linear_add(x_TD: Tensor, w_OD: Tensor, residual_TO: Tensor) -> Tensor:
    return few_tokens(x_TD, w_OD, residual_TO=residual_TO)


def norm_swiglu(x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_2ID: Tensor) -> Tensor:
    return few_tokens(x_TD, w_2ID, norm=(norm_weight_D, eps), gated=True)


def linear_reduce_add(
    x_TD: Tensor,
    w_OD: Tensor,
    residual_TO: Tensor,
    ranks: Ranks,
    *,
    next_norm: NextNorm | None = None,  # not computed
) -> Tensor:
    return few_tokens(x_TD, w_OD, residual_TO=residual_TO, ranks=ranks)


def reduce_refuses(D: int, O: int, most_tokens: int) -> Refusal:
    """Why sums of O rows of up to so many tokens cannot go over ranks within the projection, or None."""
    blocks, place_bytes = AREAS[SUMS]
    processors = min(multiprocessors(torch.device("cuda", torch.cuda.current_device())), O)
    if processors > blocks:
        return f"needs at most {blocks} multiprocessors, not {processors}"
    for tokens in (n for n in TOKENS if n < 2 * most_tokens):
        rows = -(-O // processors)
        cut = tiling(rows, D, tokens)
        if 8 * tokens * cut.rows * -(-rows // cut.tile_rows) > place_bytes:
            return f"has no room for sums of {rows} rows per multiprocessor"
    return None


def tiling(block_rows: int, D: int, tokens: int, *, norm_bytes: int = 0) -> Tiling:
    """For blocks of at most `block_rows` rows; norm_bytes: of an element of the norm's weight, if there is one.

    Of rows of at most 4096 columns a pass has as many as registers hold of x, of longer ones as leave room for a ring
    of larger tiles. A tile has all of a block's rows if these are few, or 16, or 8 where only two of 16 would fit for
    many rows. Both shrink until two tiles fit.
    """
    few = block_rows <= 24 and tokens <= 16
    most = 4096 if D <= 4096 and (tokens == 8 or few) else 2304
    passes = -(-D // most)
    while True:
        columns = D if passes == 1 else -(-D // passes // GRANULE) * GRANULE
        short = columns <= 2304 and tokens <= 16
        for rows in (24 if few else 16 if short else 8, 8):
            cut = _ring(block_rows, D, tokens, columns, rows, norm_bytes)
            if rows == 16 and tokens == 8 and cut.stages < 3 and block_rows > 64:
                continue
            if cut.stages >= 2 or (cut.stages == 1 and passes == 1 and block_rows <= cut.tile_rows):
                return cut
        if passes > 1 and columns <= GRANULE:
            raise KernelError(
                f"{block_rows} rows of {D} columns per multiprocessor do not fit; use --op linear=reference"
            )
        passes += 1


def _ring(block_rows: int, D: int, tokens: int, columns: int, rows: int, norm_bytes: int) -> Tiling:
    passes, tile_rows = -(-D // columns), min(block_rows, rows)
    row_bytes = 2 * columns + (0 if columns % 64 else 64)
    tiles = -(-block_rows // tile_rows)
    sums = 4 * tokens * rows * (2 * WARPS + (tiles if passes > 1 else 0))
    fixed = -(-norm_bytes * D // 128) * 128 + sums
    stages = min(passes * tiles, max(0, SHARED - fixed) // (tile_rows * row_bytes), MAX_STAGES)
    return Tiling(columns, rows, tile_rows, stages, fixed + stages * tile_rows * row_bytes)


def few_tokens(
    x_TD: Tensor,
    w_OD: Tensor,
    norm: tuple[Tensor, float] | None = None,
    residual_TO: Tensor | None = None,
    out_TO: Tensor | None = None,
    gated: bool = False,
    ranks: Ranks | None = None,
) -> Tensor:
    """[T, O] of at most 32 tokens: x, or its RMSNorm of (weight_D, eps), times w, plus the residual, rounded once;
    with `ranks` the product is summed over them before the residual is added.

    If `gated`, [T, O / 2]: the SiLU of the first half of that times the other.

    out_TO has a unit last stride, and is what is returned if it is given.
    """
    (T, D), O, together = x_TD.shape, w_OD.shape[0], 1 + gated
    blocks = min(multiprocessors(x_TD.device), O // together)
    tokens = next(n for n in TOKENS if n >= T)
    cut = tiling(together * -(-O // together // blocks), D, tokens, norm_bytes=norm_bytes(norm))
    macros = dict(WARPS=WARPS, TOKENS=tokens, ROWS=cut.rows, GATED=int(gated))
    arguments: tuple[Any, ...] = ()
    if gated and out_TO is None:
        out_TO = torch.empty(T, O // 2, dtype=x_TD.dtype, device=x_TD.device)
    if ranks is not None:
        exchange, arguments = exchange_arguments(ranks, SUMS)
        macros |= exchange
    return launch(SOURCE, blocks, WARPS, cut, macros, x_TD, (w_OD,), norm, residual_TO, out_TO, arguments)


def norm_bytes(norm: tuple[Tensor, float] | None) -> int:
    """Of an element of the norm's weight; 0 without a norm."""
    return 0 if norm is None else norm[0].element_size()


def launch(
    source: Path,
    blocks: int,
    warps: int,
    cut: Tiling,
    macros: dict[str, int],
    x_TD: Tensor,
    weights: tuple[Tensor, ...],
    norm: tuple[Tensor, float] | None,
    residual_TO: Tensor | None,
    out_TO: Tensor | None,
    further: tuple[Any, ...] = (),
) -> Tensor:
    """Runs kernel "few_tokens" of a source, whose weights are one tensor with O rows, or that and its scales."""
    (T, D), O = x_TD.shape, len(weights[0])
    y_TO = torch.empty(T, O, dtype=x_TD.dtype, device=x_TD.device) if out_TO is None else out_TO
    if T == 0:
        return y_TO
    x_TD = aligned_rows(x_TD)
    norm_weight_D, eps = norm or (x_TD, 0.0)
    macros = dict(D=D, PASS=cut.columns, **macros, NORM=norm_bytes(norm) // 2, ADD=int(residual_TO is not None))
    cuda_kernel(source, "few_tokens", 32 * warps, x_TD.device, **macros).launch(
        (blocks, 1, 1),
        cut.shared_bytes,
        x_TD,
        norm_weight_D,
        *weights,
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
        *further,
    )
    return y_TO
