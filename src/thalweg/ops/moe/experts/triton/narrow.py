"""Experts for a batch of tokens over weights in fp8, with activations in fp8 too: bound by streaming the weights once.

As `tiles`, a program takes a block of rows of one expert for all tokens that chose it, but nothing is widened: rows of
weights are the left operand of Hopper's matrix unit, straight from shared memory, and tokens its columns. A launch
ahead lists each expert's pairs and quantizes x, each row with a scale of its own; gate and up quantize h, each pair's
`rows` columns of a program with a scale of their own. Scales go to sums over 128 columns or fewer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thalweg.ops.moe.experts import Finish
from thalweg.ops.moe.experts.triton.grouping import Lists, list_pairs
from thalweg.ops.moe.experts.triton.narrow_kernels import TOKENS, narrow_down_kernel, narrow_gate_up_kernel
from thalweg.ops.moe.experts.triton.weighted_sum import MAX_NORMED, weighted_sum, weighted_sum_norm
from thalweg.ops.norm import NextNorm
from thalweg.ops.toolchain.triton_launch import pdl_options

NARROW = 512  # columns of down, as in `tiles`
NORMED = 128  # tokens up to which projections take x in float8 (ops/linear/fp8)


class Tile(NamedTuple):
    """How a product is cut: rows of weights, stages of the pipeline, warps; tokens of a tile if more than TOKENS chose
    an expert."""

    rows: int
    stages: int
    warps: int
    wide: int = 32


def run_gate_up(
    x_TD: Tensor, x_scale: Tensor, lists: Lists, K: int, q_E2ID: Tensor, s_gate_up: Tensor, tile: Tile
) -> tuple[Tensor, Tensor]:
    """(silu(gate x) * up x of every pair over its scales, e4m3 [T * k, I]; those, [T * k, I / rows]). Those of x are
    [T] or, one for 128 columns, [T, D / 128]."""
    (T, D), I = x_TD.shape, q_E2ID.shape[1] // 2
    h_PI = torch.empty(T * K, I, dtype=x_TD.dtype, device=x_TD.device)
    h_scales_PB = torch.empty(T * K, I // tile.rows, device=x_TD.device)
    narrow_gate_up_kernel[(len(lists.count_G) * (I // tile.rows),)](
        x_TD,
        x_scale,
        *lists,
        q_E2ID,
        s_gate_up,
        h_PI,
        h_scales_PB,
        T,
        D=D,
        I=I,
        K=K,
        BLOCK_I=tile.rows,
        WIDE=tile.wide,
        X_BLOCKS=x_scale.dim() == 2,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **pdl_options(x_TD),
    )
    return h_PI, h_scales_PB


def run_down(h_PI: Tensor, h_scales_PB: Tensor, lists: Lists, q_EDI: Tensor, s_down: Tensor, tile: Tile) -> Tensor:
    """y [T * k, D] fp32 = down h of every pair."""
    (P, I), D = h_PI.shape, q_EDI.shape[1]
    y_PD = torch.empty(P, D, device=h_PI.device)
    narrow_down_kernel[(len(lists.count_G) * (D // tile.rows),)](
        h_PI,
        h_scales_PB,
        *lists,
        q_EDI,
        s_down,
        y_PD,
        lists.list_GT.shape[1],
        D=D,
        I=I,
        GROUP=I // h_scales_PB.shape[1],
        BLOCK_D=tile.rows,
        WIDE=tile.wide,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **pdl_options(h_PI),
    )
    return y_PD


def tiles(T: int, I: int) -> tuple[Tile, Tile]:
    """Of gate and up, and of down. Of more tokens many experts have more than a tile's: in narrow experts two tiles at
    a time are then faster, whose registers are too many beside 128 rows of gate and up."""
    if T <= 64 or I > NARROW:
        return Tile(128, 3, 8, TOKENS.value), Tile(128, 4, 8, TOKENS.value)
    return Tile(64, 4, 4, 2 * TOKENS.value), Tile(128, 4, 4, 2 * TOKENS.value)


def experts(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,
    own: tuple[Tensor, Tensor] | None = None,  # refused
    scale: float = 1.0,
    finish: Finish | None = None,
    next_norm: NextNorm | None = None,
) -> Tensor:
    if len(x_TD) == 0:
        out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
        return out_TD if finish is None else finish(out_TD)
    lists, narrow_TD, x_scale_T = list_pairs(x_TD, ids_Tk, len(down[0]), False, narrow=True)
    assert x_scale_T is not None
    y_PD = outputs(narrow_TD, x_scale_T, lists, ids_Tk.shape[1], gate_up, down)
    if finish is not None:
        return finish(y_PD, weights_Tk=weights_Tk)
    return summed(y_PD, weights_Tk, x_TD, residual_TD, next_norm)


def outputs(
    narrow_TD: Tensor,
    x_scale: Tensor,
    lists: Lists,
    K: int,
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
) -> Tensor:
    """Of every pair [T * k, D] fp32, of x in e4m3."""
    up_tile, down_tile = tiles(len(narrow_TD), down[0].shape[2])
    h_PI, h_scales_PB = run_gate_up(narrow_TD, x_scale, lists, K, *gate_up, up_tile)
    return run_down(h_PI, h_scales_PB, lists, *down, down_tile)


def summed(
    y_PD: Tensor,
    weights_Tk: Tensor,
    x_TD: Tensor,
    residual_TD: Tensor | None,
    next_norm: NextNorm | None,
    counts_E: Tensor | None = None,
) -> Tensor:
    """The weighted sum of the pairs' outputs, as x, plus the residual, and of few tokens the norm behind it."""
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    (T, D), weights = x_TD.shape, (weights_Tk, out_TD)
    if next_norm is None or not next_norm.wants_float8 or T > NORMED or D > MAX_NORMED:
        return weighted_sum(y_PD, *weights, residual_TD, counts_E=counts_E)
    normed_TD = torch.empty(T, D, dtype=torch.float8_e4m3fn, device=x_TD.device)
    scale_T = torch.empty(T, dtype=torch.float32, device=x_TD.device)
    norm = (normed_TD, next_norm.weight_D, next_norm.eps)
    weighted_sum_norm(y_PD, *weights, *norm, residual_TD, normed_scale_T=scale_T, counts_E=counts_E)
    next_norm.in_float8 = normed_TD, scale_T
    return out_TD
