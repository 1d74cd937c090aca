"""Linear projections of a few tokens in CUDA C++ (few.cu says how they work).

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

SOURCE = Path(__file__).with_name("few.cu")
WARPS, MAX_STAGES = 8, 16  # as in the source
SHARED = 200 * 1024  # bytes of shared memory that a block may have for tiles and sums


class Tiling(NamedTuple):
    """How a block holds its rows: in a ring of `stages` tiles of `tile_rows`, computed `rows` at a time."""

    rows: int
    tile_rows: int
    stages: int
    shared_bytes: int


def tiling(block_rows: int, D: int, tokens: int) -> Tiling:
    """For blocks of at most `block_rows` rows: all in one tile where registers and memory allow, or else tiles of 8."""
    pitch = 2 * D + (0 if D % 64 else 64)

    def fitting(rows: int) -> int:  # rows of D columns beside the partial sums of two tiles
        return (SHARED - 2 * WARPS * tokens * rows * 4) // pitch

    rows = -(-block_rows // 8) * 8
    if rows <= 24 and tokens <= 16 and block_rows <= fitting(rows):
        return Tiling(rows, block_rows, 1, block_rows * pitch + 2 * WARPS * tokens * rows * 4)
    stages = min(-(-block_rows // 8), fitting(8) // 8, MAX_STAGES)
    return Tiling(8, 8, stages, 8 * stages * pitch + 2 * WARPS * tokens * 8 * 4)


def linear(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    return few_tokens(x_TD, w_OD)


def norm_linear(x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_OD: Tensor) -> Tensor:
    return few_tokens(x_TD, w_OD, norm=(norm_weight_D, eps))


def linear_add(x_TD: Tensor, w_OD: Tensor, residual_TO: Tensor) -> Tensor:
    return few_tokens(x_TD, w_OD, residual_TO=residual_TO)


def few_tokens(
    x_TD: Tensor, w_OD: Tensor, norm: tuple[Tensor, float] | None = None, residual_TO: Tensor | None = None
) -> Tensor:
    """[T, O] of at most 32 tokens: x, or its RMSNorm of (weight_D, eps), times w, plus the residual, rounded once."""
    (T, D), O = x_TD.shape, w_OD.shape[0]
    y_TO = torch.empty(T, O, dtype=x_TD.dtype, device=x_TD.device)
    if T == 0:
        return y_TO
    x_TD = aligned_rows(x_TD)
    blocks = min(multiprocessors(x_TD.device), O)
    tokens = next(n for n in (8, 16, 32) if n >= T)
    rows, tile_rows, stages, shared_bytes = tiling(-(-O // blocks), D, tokens)
    norm_weight_D, eps = norm or (w_OD, 0.0)
    macros = dict(D=D, TOKENS=tokens, ROWS=rows, NORM=int(norm is not None), ADD=int(residual_TO is not None))
    cuda_kernel(SOURCE, "few_tokens", 32 * WARPS, x_TD.device, **macros).launch(
        (blocks, 1, 1),
        shared_bytes,
        x_TD,
        norm_weight_D,
        w_OD,
        x_TD if residual_TO is None else residual_TO,
        y_TO,
        (c_longlong, x_TD.stride(0)),
        (c_longlong, w_OD.stride(0)),
        (c_longlong, 0 if residual_TO is None else residual_TO.stride(0)),
        (c_int, T),
        (c_int, O),
        (c_int, tile_rows),
        (c_int, stages),
        (c_float, eps),
    )
    return y_TO
