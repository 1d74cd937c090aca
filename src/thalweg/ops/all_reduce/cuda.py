"""Launches the sum over ranks of a few tokens' rows (rows.cu and ranks.cuh say how it works)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.all_reduce import AREAS, MANY_TOKENS, ROWS, Ranks, reference
from thalweg.ops.norm import NextNorm
from thalweg.ops.toolchain.cuda_build import aligned_rows, cuda_kernel

SOURCE = Path(__file__).with_name("rows.cu")
EACH = 8  # columns of a thread, of which it writes 32 bytes for each rank
MOST_TOKENS = 512  # of two ranks
OF_MANY, MANY_THREADS = Path(__file__).with_name("many.cu"), 512
MANY = {"PER": 2, "BATCH": 1, "NAP": 100}
WARP, MOST_NORM_THREADS = 32, 512  # of blocks that take whole rows, with their norms


def threads_of(D: int) -> int:
    """Of a block: as many as divide a row, or else 128."""
    return next((n for n in (128, 96, 64) if D // EACH % n == 0), 128)


def chunks_of(D: int) -> int:
    """Blocks of a token."""
    return -(-D // (EACH * threads_of(D)))


def most_tokens(D: int, ranks: int) -> int:
    """Each rank writes to every other one: beyond, sending less takes less time."""
    return min(MOST_TOKENS // (ranks - 1), AREAS[ROWS][0] // chunks_of(D))


def exchange_arguments(ranks: Ranks, area: int) -> tuple[dict[str, int], tuple[Any, ...]]:
    """Macros and arguments of a kernel that includes ranks.cuh."""
    assert ranks.peers is not None
    table, blocks, place_bytes = ranks.peers.areas[area]
    return {"RANKS": ranks.tp_size, "RANK": ranks.tp_rank}, (table, (c_longlong, blocks * place_bytes))


def all_reduce_add(
    residual_TD: Tensor,
    parts_PD: Tensor,
    ranks: Ranks,
    *,
    weights_Tk: Tensor | None = None,
    own_TD: Tensor | None = None,
    scale: float = 1.0,
    next_norm: NextNorm | None = None,  # not computed
) -> Tensor:
    T, D = residual_TD.shape
    y_TD = torch.empty(T, D, dtype=residual_TD.dtype, device=residual_TD.device)
    if T == 0:
        return y_TD
    residual_TD, parts_PD = aligned_rows(residual_TD), aligned_rows(parts_PD)
    threads = threads_of(D)
    exchange, arguments = exchange_arguments(ranks, ROWS)
    macros = {
        "D": D,
        "PARTS": 1 if weights_Tk is None else weights_Tk.shape[1],
        "WEIGHTED": int(weights_Tk is not None),
        "WIDE": int(parts_PD.dtype == torch.float32),
        "OWN": 0 if own_TD is None else own_TD.element_size() // 2,
        "BLOCK": threads,
    }
    cuda_kernel(SOURCE, "sum_over_ranks", threads, y_TD.device, **macros, **exchange).launch(
        (T * chunks_of(D), 1, 1),
        0,
        parts_PD,
        parts_PD if weights_Tk is None else weights_Tk,
        parts_PD if own_TD is None else own_TD,
        residual_TD,
        y_TD,
        (c_longlong, parts_PD.stride(0)),
        (c_longlong, residual_TD.stride(0)),
        (c_float, scale),
        *arguments,
    )
    return y_TD


def all_reduce_add_separate(
    residual_TD: Tensor,
    parts_PD: Tensor,
    ranks: Ranks,
    *,
    weights_Tk: Tensor | None = None,
    own_TD: Tensor | None = None,
    scale: float = 1.0,
    next_norm: NextNorm | None = None,  # not computed
) -> Tensor:
    """By the ranks' own collective."""
    x_TD = of_rank(residual_TD, parts_PD, weights_Tk, own_TD, scale)
    return residual_TD + ranks.all_reduce(x_TD.contiguous())


def of_rank(
    residual_TD: Tensor, parts_PD: Tensor, weights_Tk: Tensor | None, own_TD: Tensor | None, scale: float
) -> Tensor:
    """What this rank adds to the sum."""
    if weights_Tk is None or len(weights_Tk) == 0:
        return reference.of_rank(residual_TD, parts_PD, None, own_TD, scale)
    from thalweg.ops.moe.experts.triton.weighted_sum import weighted_sum

    out_TD = torch.empty(residual_TD.shape, dtype=residual_TD.dtype, device=residual_TD.device)
    block = min(1024, 1 << (out_TD.shape[1] - 1).bit_length())
    return weighted_sum(parts_PD, weights_Tk, out_TD, None, own_TD, scale, block, warps=4)


def launches_of_many(ranks: Ranks, row_bytes: int) -> tuple[int, int]:
    """Blocks of a launch that exchanges rows of many tokens, and the most rows: no rank writes to its own place."""
    blocks, place_bytes = AREAS[MANY_TOKENS]
    return blocks, ranks.tp_size * blocks * place_bytes // row_bytes


def norms_inside(D: int) -> bool:
    """Whether a block of the sum of many tokens can take whole rows."""
    return D % (EACH * WARP) == 0 and D // EACH <= MOST_NORM_THREADS


def all_reduce_add_many(
    residual_TD: Tensor,
    parts_PD: Tensor,
    ranks: Ranks,
    *,
    weights_Tk: Tensor | None = None,
    own_TD: Tensor | None = None,
    scale: float = 1.0,
    next_norm: NextNorm | None = None,
) -> Tensor:
    residual_TD = residual_TD.contiguous()
    dtype = residual_TD.dtype
    if parts_PD.dtype != dtype or (own_TD is not None and (weights_Tk is None or own_TD.dtype != dtype)):
        parts_PD = of_rank(residual_TD, parts_PD, weights_Tk, own_TD, scale)
        weights_Tk = own_TD = None
    parts_PD, y_TD = parts_PD.contiguous(), torch.empty_like(residual_TD)
    D, k = y_TD.shape[1], 1 if weights_Tk is None else weights_Tk.shape[1]
    row_bytes = D * y_TD.element_size()
    blocks, rows = launches_of_many(ranks, row_bytes)
    exchange, arguments = exchange_arguments(ranks, MANY_TOKENS)
    macros = {"D": D, "PARTS": k, "WEIGHTED": int(weights_Tk is not None), "OWN": int(own_TD is not None)}
    macros |= {"BLOCK": MANY_THREADS, **MANY, "NORM": 0, **exchange}
    norm_weight, normed_TD, eps = y_TD, y_TD, 0.0
    if next_norm is not None and not next_norm.wants_float8 and norms_inside(D):
        norm_weight, eps = next_norm.weight_D, next_norm.eps
        next_norm.normed_TD = normed_TD = torch.empty_like(y_TD)
        macros |= {"BLOCK": D // EACH, "NORM": norm_weight.element_size()}
    kernel = cuda_kernel(OF_MANY, "sum_of_many", macros["BLOCK"], y_TD.device, **macros)
    for first in range(0, len(y_TD), rows):
        y = y_TD[first : first + rows]
        kernel.launch(
            (blocks, 1, 1),
            0,
            parts_PD[first * k :],
            parts_PD if weights_Tk is None else weights_Tk[first:],
            parts_PD if own_TD is None else own_TD[first:],
            residual_TD[first:],
            y,
            (c_float, scale),
            norm_weight,
            normed_TD[first:],
            (c_float, eps),
            (c_int, len(y) * row_bytes),
            *arguments,
        )
    return y_TD
