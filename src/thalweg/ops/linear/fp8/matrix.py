"""Linear projections of some tokens over float8 by the matrix unit of warpgroups in CUDA C++ (some.cu says how they
work): x goes to float8 too, in a launch of its own that has the norm."""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thalweg.errors import KernelError
from thalweg.ops.linear.cuda import norm_bytes
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
MAX_REST, REST_TOKENS = 256, 64  # of a rest within the launch: beyond, its blocks take longer than the others
SUM_BYTES = 84  # of a warp's sums for a token there


class Cut(NamedTuple):
    """How a product is shared out: rows of a tile, blocks that share its columns, warpgroups that multiply, stages of
    the ring, bytes of shared memory."""

    rows: int
    split: int
    groups: int
    stages: int
    shared_bytes: int


def cut(T: int, D: int, O: int, processors: int) -> Cut:
    """Rows for all multiprocessors once; of few, two blocks share the columns of twice as many."""
    units, each, both = _units(T), -(-O // processors), -(-O // (processors // 2))
    split = 2 if each <= FEW_ROWS and D % (2 * BLOCK) == 0 else 1
    rows, tokens, steps = -(-(both if split == 2 else each) // 8) * 8, units * UNIT, D // split // BLOCK
    groups, tiles, stage_bytes = GROUPS[units], -(-rows // 64), (rows + tokens) * 128
    phases = groups // tiles  # warpgroups that share out steps
    behind = max(16 * BARRIERS + 4 * (steps * rows + tokens), (64 * tiles - rows) * 128)  # products may read the latter
    stages = min((SHARED - behind) // stage_bytes, steps, MAX_STAGES)
    if phases and stages < steps:
        # Each has stages of its own: a barrier tells odd phases from even ones only, so who came to a stage that
        # another still waits for would take the phase before that one for its own.
        stages -= stages % phases
    if not phases or stages < min(phases, steps):
        raise KernelError(f"{T} tokens of {D} columns and {O} rows do not fit; use --op linear_fp8=triton")
    sums = phases * tokens * (-(-rows // 16) * 16 + 4) * 4  # where the ring was
    return Cut(rows, split, groups, stages, max(stages * stage_bytes, sums) + behind)


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
) -> Tensor:
    return _with_rest(x_TD, q_OD, scale_OB, rest_RD, (norm_weight_D, eps))


def linear_add_fp8(x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, residual_TO: Tensor) -> Tensor:
    y_TO = x_TD.new_empty(len(x_TD), len(q_OD))
    some_tokens(x_TD, q_OD, scale_OB, y_TO, residual_TO=aligned_rows(residual_TO))
    return y_TO


def _with_rest(
    x_TD: Tensor, q_OD: Tensor, scale_OB: Tensor, rest_RD: Tensor | None, norm: tuple[Tensor, float] | None
) -> Tensor:
    O = len(q_OD)
    y_TX = x_TD.new_empty(len(x_TD), O + (0 if rest_RD is None else len(rest_RD)))
    split = cut(max(1, len(x_TD)), x_TD.shape[1], O, multiprocessors(x_TD.device)).split
    if rest_RD is not None and (split > 1 or len(rest_RD) > MAX_REST or len(x_TD) > REST_TOKENS):
        if norm is not None:
            x_TD, norm = rms_norm(x_TD, *norm), None
        torch.mm(x_TD, rest_RD.T, out=y_TX[:, O:])
        rest_RD = None
    some_tokens(x_TD, q_OD, scale_OB, y_TX, norm, rest_RD=rest_RD)
    return y_TX


def some_tokens(
    x_TD: Tensor,
    q_OD: Tensor,
    scale_OB: Tensor,
    y_TX: Tensor,
    norm: tuple[Tensor, float] | None = None,
    residual_TO: Tensor | None = None,
    rest_RD: Tensor | None = None,
) -> None:
    """The columns of y_TX, the first of them without a rest, whose rows begin at multiples of 16 bytes, as the
    residual's do: of at most 128 tokens x, or its RMSNorm of (weight_D, eps), times w above the rest, plus the
    residual, rounded once."""
    (T, D), O, device = x_TD.shape, len(q_OD), x_TD.device
    if T == 0:
        return
    how, units = cut(T, D, O, multiprocessors(device)), _units(T)
    x_TD = aligned_rows(x_TD)
    narrow_TD, x_scales_T, _ = quantize_rows(x_TD, None, norm)
    macros = dict(UNITS=units, GROUPS=how.groups, SPLIT=how.split, ADD=int(residual_TO is not None), REST=0)
    rest: tuple[Any, ...] = ()
    blocks = -(-O // how.rows) * how.split
    if rest_RD is not None:
        weight_D, eps = norm or (x_TD, 0.0)
        macros |= dict(REST=1, NORM=norm_bytes(norm) // 2)
        blocks += -(-len(rest_RD) // UNIT)
        rest = (rest_RD, x_TD, weight_D, (c_longlong, x_TD.stride(0)), (c_int, len(rest_RD)), (c_float, eps))
    shared = max(how.shared_bytes, 4 * how.groups * units * UNIT * SUM_BYTES if rest else 0)
    cuda_kernel(SOURCE, "some_tokens", 128 * how.groups + 32, device, **macros).launch(
        (blocks, 1, 1),
        shared,
        (None, tensor_map(_in_pairs(q_OD), how.rows)),
        (None, tensor_map(_in_pairs(narrow_TD), UNIT * units)),
        scale_OB,
        x_scales_T,
        y_TX if residual_TO is None else residual_TO,
        y_TX,
        (c_longlong, 0 if residual_TO is None else residual_TO.stride(0)),
        (c_longlong, y_TX.stride(0)),
        (c_int, T),
        (c_int, O),
        (c_int, how.rows),
        (c_int, D // how.split // BLOCK),
        (c_int, how.stages),
        *rest,
    )


def _in_pairs(q_RD: Tensor) -> Tensor:
    """As a tensor map has it: two float8 for a value."""
    return q_RD.view(torch.bfloat16).view(len(q_RD), 1, -1)
