"""Linear projections of a few tokens over float8 in CUDA C++ (few.cu says how they work): a launch, and one more if
there is a rest in bf16 of more than a few rows."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from thalweg.ops.linear import cuda as bf16
from thalweg.ops.toolchain.triton_support import multiprocessors
from thalweg.quant.blocks import BLOCK

SOURCE = Path(__file__).with_name("few.cu")
MAX_STAGES, BUFFERS = 16, 4  # as in the source
SHARED = 222 * 1024  # bytes of shared memory that a block may ask for
COLUMNS = 4096  # that a pass has at most: what registers hold of x
ROWS, ROW_GROUP = 16, 8  # of a tile at most; dealt out together, so that their scales are copied 16 bytes at a time
GRANULE = 512  # columns whose scales of a row are 16 bytes
REST_BYTES = 32 * 1024  # of the rest that a block may hold


def linear_fp8(x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, rest_RD: Tensor | None = None) -> Tensor:
    return _both(x_TD, q_OD, scale_OB, rest_RD, None)


def norm_linear_fp8(
    x_TD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    q_OD: Tensor,
    scale_OB: Tensor,
    rest_RD: Tensor | None = None,
    *,
    in_float8: tuple[Tensor, Tensor] | None = None,  # not used
) -> Tensor:
    return _both(x_TD, q_OD, scale_OB, rest_RD, (norm_weight_D, eps))


def linear_add_fp8(x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, residual_TO: Tensor) -> Tensor:
    return few_tokens(x_TD, q_OD, scale_OB, residual_TO=residual_TO)


def _both(
    x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, rest_RD: Tensor | None, norm: tuple[Tensor, float] | None
) -> Tensor:
    if rest_RD is None:
        return few_tokens(x_TD, q_OD, scale_OB, norm)
    O = len(q_OD)
    y_TX = x_TD.new_empty(len(x_TD), O + len(rest_RD))
    each = -(-len(rest_RD) // _blocks(x_TD, q_OD))
    if each * rest_RD[0].nbytes <= REST_BYTES and each <= 2:
        return few_tokens(x_TD, q_OD, scale_OB, norm, out_TO=y_TX, rest_RD=rest_RD)
    few_tokens(x_TD, q_OD, scale_OB, norm, out_TO=y_TX[:, :O])
    bf16.few_tokens(x_TD, rest_RD, norm, out_TO=y_TX[:, O:])
    return y_TX


def _blocks(x_TD: Tensor, q_OD: Tensor) -> int:
    return min(multiprocessors(x_TD.device), len(q_OD) // ROW_GROUP)


def warps(tokens: int, passes: int) -> int:
    """That multiply."""
    return 8 if tokens == 8 and passes == 1 else 11


def tiling(
    block_rows: int, D: int, tokens: int, norm_bytes: int = 0, rest_each: int = 0, one: bool = False
) -> bf16.Tiling:
    """For blocks of at most `block_rows` rows, and rest_each of the rest; norm_bytes: of an element of the norm's
    weight, if there is one; one: of one token, which is in shared memory.

    Passes are as few as registers allow, or more until a ring of two tiles fits; tiles are equally high.
    """
    tiles = -(-block_rows // ROWS)
    tile_rows = -(-block_rows // tiles // ROW_GROUP) * ROW_GROUP
    passes = -(-D // COLUMNS)
    while True:
        columns = D if passes == 1 else -(-D // passes // GRANULE) * GRANULE
        by_row = passes > 1 or tokens > 8  # as in the source
        scales = columns // BLOCK + (4 if by_row and D // BLOCK % 4 == 0 and columns // BLOCK % 8 == 0 else 0)
        stage_bytes = tile_rows * (columns + 64 + 4 * scales)
        sums = tokens // 8 * 512 * (BUFFERS * warps(tokens, passes) + (tiles if passes > 1 else 0))
        fixed = -(-norm_bytes * D // 128) * 128 + (rest_each + one) * D * 2 + sums
        stages = min(passes * tiles, max(0, SHARED - fixed) // stage_bytes, MAX_STAGES)
        if stages >= min(2, passes * tiles) or columns <= GRANULE:
            return bf16.Tiling(columns, ROWS, tile_rows, stages, fixed + stages * stage_bytes)
        passes += 1


def shares_one(D: int, norm_bytes: int) -> bool:
    """Whether all lanes of a warp prepare a single token of D columns (one.cuh). In one pass behind a norm, whose
    weight has norm_bytes per column, that takes longer."""
    return D > COLUMNS or not norm_bytes


def few_tokens(
    x_TD: Tensor,
    q_OD: Tensor,
    scale_OB: Tensor,
    norm: tuple[Tensor, float] | None = None,
    residual_TO: Tensor | None = None,
    out_TO: Tensor | None = None,
    rest_RD: Tensor | None = None,
) -> Tensor:
    """[T, O] of at most 16 tokens: x, or its RMSNorm of (weight_D, eps), times w, plus the residual, rounded once.

    out_TO has a unit last stride, and is what is returned if it is given. With rest_RD, of up to two rows for a block,
    it is [T, O + R].
    """
    (T, D), O, blocks = x_TD.shape, q_OD.shape[0], _blocks(x_TD, q_OD)
    tokens, rest = 8 if T <= 8 else 16, 0 if rest_RD is None else len(rest_RD)
    each = -(-rest // blocks)
    block_rows, norm_bytes = ROW_GROUP * -(-O // ROW_GROUP // blocks), bf16.norm_bytes(norm)
    cut, one = tiling(block_rows, D, tokens, norm_bytes, each), False
    if T == 1 and shares_one(D, norm_bytes):
        shared = tiling(block_rows, D, tokens, norm_bytes, each, one=True)
        if shared.columns == cut.columns and shared.stages == cut.stages:
            cut, one = shared, True
    multiply = warps(tokens, -(-D // cut.columns))
    macros = dict(WARPS=multiply, TOKENS=tokens, REST=rest, REST_EACH=each, ONE=int(one))
    weights = (q_OD, scale_OB, x_TD if rest_RD is None else rest_RD)
    return bf16.launch(SOURCE, blocks, multiply + 1, cut, macros, x_TD, weights, norm, residual_TO, out_TO)
