"""Experts for a batch of tokens: a program takes a block of rows of one expert for all tokens that chose it.

Weights in x's dtype, three launches: gate and up with SiLU find the pairs of an expert by scanning the ids themselves,
and list them for down, then comes the weighted sum. Weights in fp8 or int4, four: what bounds these, beside the memory,
is the widening of weights in registers, so a launch ahead brings x to fp16, or its columns into the order of nibbles,
and lists each expert's pairs while it is there. An own expert has programs of its own, the first of both products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from thalweg.ops.moe.experts import Finish
from thalweg.ops.moe.experts.triton.grouping import Lists, empty_lists, list_pairs, scan_of
from thalweg.ops.moe.experts.triton.nibbles import ordered_width
from thalweg.ops.moe.experts.triton.products import BLOCK, scheme_of
from thalweg.ops.moe.experts.triton.tile_kernels import WIDE, down_tile_kernel, gate_up_tile_kernel
from thalweg.ops.moe.experts.triton.weighted_sum import MAX_NORMED, weighted_sum, weighted_sum_norm
from thalweg.ops.norm import NextNorm
from thalweg.ops.toolchain.triton_launch import pdl_options

TOKENS = 16  # of a tile
NORMED = 33  # tokens from which on projections take no norm into their launch (ops/linear), so that the sum has it
NARROW = 512  # columns of down, of which a tile of more rows is as much work
SMALL_BATCH = 128  # above, an expert's tokens are several tiles one after the other: finer blocks spread them


class Tile(NamedTuple):
    """How a product is cut: rows of weights and columns at a time, stages of the pipeline, warps."""

    rows: int
    columns: int
    stages: int
    warps: int


def gate_up_tile(T: int, I: int, x_dtype: torch.dtype, scheme: str) -> Tile:
    if scheme == "none":
        return Tile(64, 128, 4 if I <= NARROW and x_dtype != torch.float32 else 3, 4)
    if x_dtype == torch.float32:  # no tensor cores: a small tile, for registers
        return Tile(16, BLOCK.value, 1, 4)
    if scheme == "int4":
        return Tile(64, 128, 4, 4)
    return Tile(128, BLOCK.value, 4, 8) if T <= (64 if I <= NARROW else SMALL_BATCH) else Tile(64, BLOCK.value, 4, 4)


def down_tile(T: int, I: int, h_dtype: torch.dtype, scheme: str) -> Tile:
    if scheme == "none":
        return Tile(256, 64, 4, 8) if I <= NARROW and h_dtype != torch.float32 else Tile(128, 128, 3, 4)
    if h_dtype == torch.float32:
        return Tile(16, BLOCK.value, 1, 4)
    if scheme == "int4":
        return Tile(128, 128, 4, 4)
    return Tile(256, BLOCK.value, 4, 8) if T <= SMALL_BATCH else Tile(128, BLOCK.value, 3, 4)


class Grouping(NamedTuple):
    """Where the programs of the products find their pairs, if `found` once "gate_up" has listed them."""

    ids_Tk: Tensor
    lists: Lists
    found: bool
    scan: dict[str, Any]


def grouping_of(ids_Tk: Tensor, experts: int, lists: Lists | None) -> Grouping:
    if lists is not None:
        return Grouping(ids_Tk, lists, False, {"BY_PAIR": False, "BLOCK_P": 16})
    scan = scan_of(ids_Tk.numel(), experts, 256)
    found = empty_lists(scan.groups, len(ids_Tk), ids_Tk.device)
    return Grouping(ids_Tk, found, True, {"BY_PAIR": scan.by_pair, "BLOCK_P": scan.ids})


def experts_of_tiles(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,
    own: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    finish: Finish | None = None,
    next_norm: NextNorm | None = None,
) -> Tensor:
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if len(x_TD) == 0:
        return out_TD if finish is None else finish(out_TD)
    experts, scheme, ready_TD, lists, x_scale_T = len(down[0]), scheme_of(*down), x_TD, None, None
    if scheme != "none":
        lists, ready_TD, x_scale_T = list_pairs(x_TD, ids_Tk, experts, scheme == "int4")
    grouping = grouping_of(ids_Tk, experts, lists)
    own_gate_up, own_down = own or (None, None)
    h, own_h = run_gate_up(x_TD, ready_TD, x_scale_T, grouping, own_gate_up, *gate_up)
    y_PD, own_TD = run_down(h, own_h, gate_up[0].shape[1] // 2, grouping, own_down, *down)
    if finish is not None:
        return finish(y_PD, weights_Tk=weights_Tk, own_TD=own_TD, scale=scale)
    if next_norm is None or next_norm.wants_float8 or len(x_TD) < NORMED or x_TD.shape[1] > MAX_NORMED:
        return weighted_sum(y_PD, weights_Tk, out_TD, residual_TD, own_TD, scale)
    next_norm.normed_TD = torch.empty_like(out_TD)
    norm = (next_norm.weight_D, next_norm.eps)
    weighted_sum_norm(y_PD, weights_Tk, out_TD, next_norm.normed_TD, *norm, residual_TD, own_TD, scale)
    return out_TD


# The own expert within those launches: rows and columns at a time.
OWN_GATE_UP, OWN_DOWN, OWN_FP32 = Tile(32, 64, 3, 4), Tile(64, 64, 3, 4), Tile(16, 32, 1, 4)


def run_gate_up(
    x_TD: Tensor,
    ready_TD: Tensor,
    x_scale_T: Tensor | None,
    grouping: Grouping,
    own: Tensor | None,
    weights: Tensor,
    scales: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(h of every pair = silu(gate x) * up x, [T * k, I], or with int4 [T * k, places of I]; h of the own expert)."""
    (T, K), (E, I2, _), D = grouping.ids_Tk.shape, weights.shape, x_TD.shape[1]
    I, scheme = I2 // 2, scheme_of(weights, scales)
    tile = tile or gate_up_tile(T, I, x_TD.dtype, scheme)
    width = ordered_width(I) if scheme == "int4" else I
    h = torch.empty(T * K, width, dtype=x_TD.dtype, device=x_TD.device)
    cut = OWN_GATE_UP if x_TD.dtype != torch.float32 else OWN_FP32
    own_width, own_programs, own_h = 0, 0, None
    own_tokens = TOKENS if T <= TOKENS or x_TD.dtype == torch.float32 else WIDE.value
    if own is not None:
        own_width = len(own) // 2
        own_programs = triton.cdiv(T, own_tokens) * triton.cdiv(own_width, cut.rows)
        own_h = torch.empty(T, own_width, dtype=x_TD.dtype, device=x_TD.device)
    gate_up_tile_kernel[(own_programs + len(grouping.lists.count_G) * triton.cdiv(width, tile.rows),)](
        ready_TD,
        x_scale_T,
        grouping.ids_Tk,
        *grouping.lists,
        weights,
        scales,
        h,
        None if own is None else x_TD,
        own,
        own_h,
        T * K,
        T,
        ready_TD.stride(0),
        x_TD.stride(0),
        own_programs,
        E=E,
        D=D,
        I=I,
        K=K,
        OWN=own_width,
        FOUND=grouping.found,
        **grouping.scan,
        BLOCK_T=TOKENS,
        OWN_T=own_tokens,
        BLOCK_I=tile.rows,
        OWN_I=cut.rows,
        BLOCK_D=tile.columns,
        OWN_D=cut.columns,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **pdl_options(x_TD),
    )
    return h, own_h


def run_down(
    h: Tensor,
    own_h: Tensor | None,
    I: int,
    grouping: Grouping,
    own: Tensor | None,
    weights: Tensor,
    scales: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y [T * k, D] fp32 = down h of every pair; y [T, D] fp32 of the own expert)."""
    (T, K), D = grouping.ids_Tk.shape, weights.shape[1]
    tile = tile or down_tile(T, I, h.dtype, scheme_of(weights, scales))
    y_PD = torch.empty(T * K, D, dtype=torch.float32, device=h.device)
    cut = OWN_DOWN if h.dtype != torch.float32 else OWN_FP32
    own_programs, own_y = 0, None
    own_tokens = TOKENS if T <= TOKENS or h.dtype == torch.float32 else WIDE.value
    if own is not None:
        own_programs = triton.cdiv(T, own_tokens) * triton.cdiv(D, cut.rows)
        own_y = torch.empty(T, D, dtype=torch.float32, device=h.device)
    down_tile_kernel[(own_programs + len(grouping.lists.count_G) * triton.cdiv(D, tile.rows),)](
        h,
        *grouping.lists,
        weights,
        scales,
        y_PD,
        own_h,
        own,
        own_y,
        T,
        own_programs,
        D=D,
        I=I,
        OWN=0 if own is None else own.shape[1],
        FOUND=grouping.found,
        BLOCK_T=TOKENS,
        OWN_T=own_tokens,
        BLOCK_D=tile.rows,
        OWN_D=cut.rows,
        BLOCK_I=tile.columns,
        OWN_I=cut.columns,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **pdl_options(h),
    )
    return y_PD, own_y
