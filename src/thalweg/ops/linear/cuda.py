"""Linear projections of a few tokens in CUDA C++ (few.cu says how they work), by the library beyond.

The library cannot load weights before the kernel ahead is done, which matters while a projection takes microseconds.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from thalweg.ops.linear import triton
from thalweg.ops.toolchain.cuda_build import cuda_kernel
from thalweg.ops.toolchain.triton_support import multiprocessors

SOURCE = Path(__file__).with_name("few.cu")
WARPS, MAX_STAGES = 8, 16  # as in the source
MAX_TOKENS = 16  # beyond, x does not fit the registers of a block
NORM_TOKENS, NORM_COLUMNS = 32, 2304  # so many columns do; there a norm inside saves its launch, and no time
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
    if rows <= 24 and tokens <= MAX_TOKENS and block_rows <= fitting(rows):
        return Tiling(rows, block_rows, 1, block_rows * pitch + 2 * WARPS * tokens * rows * 4)
    stages = min(-(-block_rows // 8), fitting(8) // 8, MAX_STAGES)
    return Tiling(8, 8, stages, 8 * stages * pitch + 2 * WARPS * tokens * 8 * 4)


def linear(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    return few_tokens(x_TD, w_OD) if _served(x_TD, w_OD) else F.linear(x_TD, w_OD)


def norm_linear(x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_OD: Tensor) -> Tensor:
    most = NORM_TOKENS if w_OD.shape[1] <= NORM_COLUMNS else MAX_TOKENS
    if _served(x_TD, w_OD, norm_weight_D, most=most):
        return few_tokens(x_TD, w_OD, norm=(norm_weight_D, eps))
    return triton.norm_linear(x_TD, norm_weight_D, eps, w_OD)


def linear_add(x_TD: Tensor, w_OD: Tensor, residual_TO: Tensor) -> Tensor:
    if _served(x_TD, w_OD) and residual_TO.stride(1) == 1:
        return few_tokens(x_TD, w_OD, residual_TO=residual_TO)
    return triton.linear_add(x_TD, w_OD, residual_TO)


def _served(x_TD: Tensor, *others: Tensor, most: int = MAX_TOKENS) -> bool:
    """Whether there are few tokens, and all rows lie where 16 bytes may be read at a time."""
    few = 0 < x_TD.shape[0] <= most
    return few and all(
        t.data_ptr() % 16 == 0 and t.stride(-1) == 1 and (t.ndim == 1 or t.stride(0) % 8 == 0) for t in (x_TD, *others)
    )


def few_tokens(
    x_TD: Tensor, w_OD: Tensor, norm: tuple[Tensor, float] | None = None, residual_TO: Tensor | None = None
) -> Tensor:
    """[T, O]: x, or its RMSNorm of (weight_D, eps), times w, plus the residual, rounded once."""
    (T, D), O = x_TD.shape, w_OD.shape[0]
    y_TO = torch.empty(T, O, dtype=x_TD.dtype, device=x_TD.device)
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
