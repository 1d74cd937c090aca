"""Linear projections of up to 128 tokens by the matrix unit of warpgroups in CUDA C++ (some.cu says how they work).

The library's products of so few rows reach two thirds of the memory's rate where the weight has few rows, or many
columns, and often take two launches.
"""

from __future__ import annotations

from ctypes import c_int, c_longlong
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thalweg.errors import KernelError
from thalweg.ops.all_reduce import AREAS, SUMS, Ranks
from thalweg.ops.all_reduce.cuda import exchange_arguments
from thalweg.ops.norm import NextNorm
from thalweg.ops.norm.triton.rms import rms_norm
from thalweg.ops.registry import Refusal
from thalweg.ops.toolchain.cuda_build import aligned_rows, cuda_kernel
from thalweg.ops.toolchain.tensor_map import tensor_map
from thalweg.ops.toolchain.triton_support import multiprocessors

SOURCE = Path(__file__).with_name("some.cu")
UNIT, STEP_BYTES, MAX_STAGES, PITCH = 16, 128, 24, 68  # as in the source
GROUPS = 3  # of 64 rows of a tile
THREADS = 128 * GROUPS + 64
SHARED = 224 * 1024  # bytes of shared memory that a block may ask for


class Cut(NamedTuple):
    """How a product is shared out: rows of a tile, blocks that share its columns, whether two blocks share x."""

    rows: int
    split: int
    pair: bool


def linear(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    return some_tokens(x_TD, w_OD)


def norm_linear(x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_OD: Tensor) -> Tensor:
    return some_tokens(rms_norm(x_TD, norm_weight_D, eps), w_OD)


def linear_add(x_TD: Tensor, w_OD: Tensor, residual_TO: Tensor) -> Tensor:
    return some_tokens(x_TD, w_OD, residual_TO)


def norm_swiglu(x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_2ID: Tensor) -> Tensor:
    return some_tokens(rms_norm(x_TD, norm_weight_D, eps), w_2ID, gated=True)


def linear_reduce_add(
    x_TD: Tensor,
    w_OD: Tensor,
    residual_TO: Tensor,
    ranks: Ranks,
    *,
    next_norm: NextNorm | None = None,  # not computed
) -> Tensor:
    return some_tokens(x_TD, w_OD, residual_TO, ranks=ranks)


def reduce_refuses(O: int, most_tokens: int) -> Refusal:
    """Why sums of O rows of up to so many tokens cannot go over ranks within the projection, or None."""
    blocks, place_bytes = AREAS[SUMS]
    how = cut(O, multiprocessors(torch.device("cuda", torch.cuda.current_device())))
    if how.pair or -(-O // how.rows) * how.split > blocks:
        return f"needs at most {blocks} blocks that have a tile each, not {O} rows"
    if place_bytes < 32 * THREADS or most_tokens * how.rows // 8 > how.split * THREADS:
        return f"has no room for sums of {how.rows} rows per {how.split} multiprocessors"
    return None


def cut(O: int, processors: int, unit: int = 8) -> Cut:
    """Rows for all multiprocessors once, a multiple of `unit`. Of few, a block would wait for x longer than for its
    part of w: two share the columns of twice as many. More than registers hold go round by round."""
    most, each, both = 64 * GROUPS, -(-O // processors), -(-O // (processors // 2))
    if each > most:
        return Cut(most, 1, True)
    return Cut(-(-each // unit) * unit, 1, False) if each > 56 else Cut(-(-both // unit) * unit, 2, False)


def shared_bytes(cut: Cut, tokens: int) -> tuple[int, int]:
    """(stages of the ring, bytes that a launch asks for)."""
    stage = (cut.rows + tokens) * STEP_BYTES
    behind = 16 * MAX_STAGES + (GROUPS * UNIT * PITCH * 4 if cut.split == 1 else 8192)
    stages = min((SHARED - behind) // stage, MAX_STAGES)
    if stages < 2:
        raise KernelError(f"two stages of {cut.rows} rows and {tokens} tokens do not fit; use --op linear=reference")
    phases = max(1, min(GROUPS // -(-cut.rows // 64), stages // 2))  # warpgroups that share out steps
    # Each has stages of its own: a barrier tells odd phases from even ones only, so who came to a stage that another
    # still waits for would take the phase before that one for its own.
    stages -= stages % phases
    sums = phases * tokens * (-(-cut.rows // 16) * 16 + 4) * 4
    return stages, max(stages * stage + behind, sums)


def some_tokens(
    x_TD: Tensor,
    w_OD: Tensor,
    residual_TO: Tensor | None = None,
    out_TO: Tensor | None = None,
    how: Cut | None = None,
    gated: bool = False,
    ranks: Ranks | None = None,
) -> Tensor:
    """[T, O] of at most 128 tokens in bf16: x times w, plus the residual, rounded once; or, if `gated`, [T, O / 2], the
    SiLU of the first half of that times the other. With `ranks` the product is rounded and summed over them before the
    residual is added.

    out_TO has a unit last stride, and is what is returned if it is given.
    """
    (T, D), O, device = x_TD.shape, len(w_OD), x_TD.device
    y_TO = torch.empty(T, O // (1 + gated), dtype=x_TD.dtype, device=device) if out_TO is None else out_TO
    if T == 0:
        return y_TO
    x_TD, residual_TO = aligned_rows(x_TD), None if residual_TO is None else aligned_rows(residual_TO)
    units = next(n for n in (2, 3, 4, 6, 8) if UNIT * n >= T)
    how = how or cut(O, multiprocessors(device), 16 if gated else 8)
    stages, shared = shared_bytes(how, UNIT * units)
    tiles, cluster = -(-O // how.rows), 2 if how.pair else how.split
    blocks = (
        tiles * how.split if how.split > 1 else min(-(-tiles // cluster), multiprocessors(device) // cluster) * cluster
    )
    macros = dict(UNITS=units, SPLIT=how.split, PAIR=int(how.pair), ADD=int(residual_TO is not None), GATED=int(gated))
    further: tuple[Any, ...] = ()
    if ranks is not None:
        exchange, further = exchange_arguments(ranks, SUMS)
        macros |= exchange
    cuda_kernel(SOURCE, "some_tokens", THREADS, device, **macros).launch(
        (blocks, 1, 1),
        shared,
        (None, tensor_map(w_OD.view(O, 1, D), how.rows // (1 + gated))),
        (None, tensor_map(x_TD.unsqueeze(1), UNIT * units // (2 if how.pair else 1))),
        y_TO if residual_TO is None else residual_TO,
        y_TO,
        (c_longlong, 0 if residual_TO is None else residual_TO.stride(0)),
        (c_longlong, y_TO.stride(0)),
        (c_int, T),
        (c_int, O),
        (c_int, how.rows),
        (c_int, -(-2 * D // STEP_BYTES)),
        (c_int, stages),
        *further,
    )
    return y_TO
