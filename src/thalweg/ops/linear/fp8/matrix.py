"""Linear projections of some tokens over float8 by the matrix unit of warpgroups in CUDA C++ (some.cu says how they
work): x goes to float8 too, in a launch of its own that has the norm, if it does not come so from the launch ahead."""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thalweg.errors import KernelError
from thalweg.ops.linear.cuda import norm_bytes
from thalweg.ops.linear.fp8 import REST_ROWS, REST_TOKENS
from thalweg.ops.norm.triton.rms import rms_norm
from thalweg.ops.products.triton import quantize_rows
from thalweg.ops.toolchain.cuda_build import aligned_rows, cuda_kernel
from thalweg.ops.toolchain.tensor_map import tensor_map
from thalweg.ops.toolchain.triton_support import multiprocessors
from thalweg.quant.blocks import BLOCK

SOURCE = Path(__file__).with_name("some.cu")
UNIT, BARRIERS = 16, 24  # as in the source
GROUPS = {2: 4, 3: 4, 4: 3, 6: 3, 8: 2}  # warpgroups, by units of tokens: as many as have registers
MAX_STAGES = BARRIERS
SHARED = 224 * 1024  # bytes of shared memory that a block may ask for
FEW_ROWS = 56  # of a block: with fewer it would wait for x longer than for its part of w
MAX_REST = 256  # rows of a rest within the launch
WHOLE_TOKENS = 64  # of which a block of it has all
SUM_BYTES = 84  # of a warp's sums for a token there


class Cut(NamedTuple):
    """How a product is shared out: rows of a tile, blocks that share its columns, warpgroups that multiply, stages of
    the ring, bytes of shared memory."""

    rows: int
    split: int
    groups: int
    stages: int
    shared_bytes: int


def cut(T: int, D: int, O: int, processors: int, x_blocks: bool = False, rest_blocks: int = 0) -> Cut:
    """Rows for all multiprocessors once; of few, two blocks share the columns of twice as many. Of many tokens a rest
    takes as long as the tiles, and has `rest_blocks` multiprocessors to itself."""
    if T > WHOLE_TOKENS:
        processors -= rest_blocks
    units, each, both = _units(T), -(-O // processors), -(-O // (processors // 2))
    split = 2 if each <= FEW_ROWS and D % (2 * BLOCK) == 0 else 1
    rows, tokens, steps = -(-(both if split == 2 else each) // 8) * 8, units * UNIT, D // split // BLOCK
    groups, tiles, stage_bytes = GROUPS[units], -(-rows // 64), (rows + tokens) * 128
    phases = groups // tiles  # warpgroups that share out steps
    stage_scales = 4 * tokens if x_blocks else 0
    behind = max(16 * BARRIERS + 4 * (steps * rows + tokens), (64 * tiles - rows) * 128)  # products may read the latter
    stages = min((SHARED - behind) // (stage_bytes + stage_scales), steps, MAX_STAGES)
    if phases and stages < steps:
        # Each has stages of its own: a barrier tells odd phases from even ones only, so who came to a stage that
        # another still waits for would take the phase before that one for its own.
        stages -= stages % phases
    if not phases or stages < min(phases, steps):
        raise KernelError(f"{T} tokens of {D} columns and {O} rows do not fit; use --op linear_fp8=triton")
    sums = phases * tokens * (-(-rows // 16) * 16 + 4) * 4  # where the ring was
    return Cut(rows, split, groups, stages, max(stages * stage_bytes, sums) + behind + stages * stage_scales)


def _units(T: int) -> int:
    return next(n for n in GROUPS if n * UNIT >= T)


def linear_fp8(x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, rest_RD: Tensor | None = None) -> Tensor:
    return _with_rest(x_TD, q_OD, scale_OB, rest_RD, None)


def norm_linear_fp8(
    x_TD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    q_OD: Tensor,
    scale_OB: Tensor,
    rest_RD: Tensor | None = None,
    *,
    in_float8: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    return _with_rest(x_TD, q_OD, scale_OB, rest_RD, (norm_weight_D, eps), in_float8)


def linear_add_fp8(x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, residual_TO: Tensor) -> Tensor:
    y_TO = x_TD.new_empty(len(x_TD), len(q_OD))
    some_tokens(x_TD, q_OD, scale_OB, y_TO, residual_TO=aligned_rows(residual_TO))
    return y_TO


def _with_rest(
    x_TD: Tensor,
    q_OD: Tensor,
    scale_OB: Tensor,
    rest_RD: Tensor | None,
    norm: tuple[Tensor, float] | None,
    in_float8: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    T, O = len(x_TD), len(q_OD)
    y_TX = x_TD.new_empty(T, O + (0 if rest_RD is None else len(rest_RD)))
    if rest_RD is not None:
        processors, blocks = multiprocessors(x_TD.device), _rest_blocks(T, len(rest_RD))
        fits = len(rest_RD) <= MAX_REST and 2 * blocks <= processors
        if not fits or cut(max(1, T), x_TD.shape[1], O, processors, rest_blocks=blocks).split > 1:
            if norm is not None:
                x_TD, norm = rms_norm(x_TD, *norm), None
            torch.mm(x_TD, rest_RD.T, out=y_TX[:, O:])
            rest_RD = None
    some_tokens(x_TD, q_OD, scale_OB, y_TX, norm, rest_RD=rest_RD, in_float8=in_float8)
    return y_TX


def _rest_blocks(T: int, R: int) -> int:
    return -(-R // REST_ROWS) * -(-T // _rest_tokens(T))


def _rest_tokens(T: int) -> int:
    return REST_TOKENS if T > WHOLE_TOKENS else max(1, T)


def some_tokens(
    x_TD: Tensor,
    q_OD: Tensor,
    scale_OB: Tensor,
    y_TX: Tensor,
    norm: tuple[Tensor, float] | None = None,
    residual_TO: Tensor | None = None,
    rest_RD: Tensor | None = None,
    in_float8: tuple[Tensor, Tensor] | None = None,
) -> None:
    """The columns of y_TX, the first of them without a rest, whose rows begin at multiples of 16 bytes, as the
    residual's do: of at most 128 tokens x, or its RMSNorm of (weight_D, eps), times w above the rest, plus the
    residual, rounded once. in_float8: that x, if it is known."""
    if len(x_TD) == 0:
        return
    x_TD = aligned_rows(x_TD)
    rest = None if rest_RD is None else (rest_RD, x_TD, norm)
    if in_float8 is None:
        narrow_TD, x_scales_T, _ = quantize_rows(x_TD, None, norm)
        in_float8 = narrow_TD, x_scales_T
    multiply_float8(in_float8, q_OD, scale_OB, y_TX, residual_TO, rest)


def multiply_float8(
    x: tuple[Tensor, Tensor],
    q_OD: Tensor,
    scale_OB: Tensor,
    y_TX: Tensor,
    residual_TO: Tensor | None = None,
    rest: tuple[Tensor, Tensor, tuple[Tensor, float] | None] | None = None,
) -> None:
    """Write y [T, O], bf16: `some_tokens` of x in e4m3 [T, D] over its scales fp32, one for each token [T] or for 128
    columns of it [D / 128, T and what fills it up to a multiple of UNIT], contiguous. `rest`: its rows, x as it was,
    and the norm."""
    narrow_TD, x_scales = x
    (T, D), O, device = narrow_TD.shape, len(q_OD), narrow_TD.device
    x_blocks, rest_blocks = x_scales.dim() == 2, 0 if rest is None else _rest_blocks(T, len(rest[0]))
    how, units = cut(T, D, O, multiprocessors(device), x_blocks, rest_blocks), _units(T)
    macros = dict(UNITS=units, GROUPS=how.groups, SPLIT=how.split)
    macros |= dict(ADD=int(residual_TO is not None), X_BLOCKS=int(x_blocks), REST=0)
    more: tuple[Any, ...] = ()
    if rest is not None:
        rest_RD, x_TD, norm = rest
        weight_D, eps = norm or (x_TD, 0.0)
        macros |= dict(REST=1, NORM=norm_bytes(norm) // 2)
        more = (rest_RD, x_TD, weight_D, (c_longlong, x_TD.stride(0)), (c_int, len(rest_RD)))
        more += ((c_int, _rest_tokens(T)), (c_float, eps))
    shared = max(how.shared_bytes, 4 * how.groups * units * UNIT * SUM_BYTES if more else 0)
    cuda_kernel(SOURCE, "some_tokens", 128 * how.groups + 32, device, **macros).launch(
        (-(-O // how.rows) * how.split + rest_blocks, 1, 1),
        shared,
        (None, tensor_map(_in_pairs(q_OD), how.rows)),
        (None, tensor_map(_in_pairs(narrow_TD), UNIT * units)),
        scale_OB,
        x_scales,
        y_TX if residual_TO is None else residual_TO,
        y_TX,
        (c_longlong, 0 if residual_TO is None else residual_TO.stride(0)),
        (c_longlong, y_TX.stride(0)),
        (c_int, T),
        (c_int, O),
        (c_int, how.rows),
        (c_int, D // how.split // BLOCK),
        (c_int, x_scales.shape[1] if x_blocks else 0),
        (c_int, how.stages),
        *more,
    )


def _in_pairs(q_RD: Tensor) -> Tensor:
    """As a tensor map has it: two float8 for a value."""
    return q_RD.view(torch.bfloat16).view(len(q_RD), 1, -1)
