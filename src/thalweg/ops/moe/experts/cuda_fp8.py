"""Experts in fp8 for a few tokens by products in CUDA C++ (experts.cu says how they work)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_longlong
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.moe.experts import MAX_CUDA_WARPS, Finish, steps_per_warp
from thalweg.ops.moe.experts.arrivals import arrivals, told_logits
from thalweg.ops.moe.experts.triton.weighted_sum import weighted_sum
from thalweg.ops.toolchain.cuda_build import cuda_kernel
from thalweg.ops.toolchain.triton_support import multiprocessors
from thalweg.quant.blocks import BLOCK

MAX_TOKENS = 16
ENDING_COLUMNS = 4096  # from which on down ends with the weighted sum; for fewer that has not been timed
SOURCE = Path(__file__).with_name("experts.cu")
ONE_SOURCE = Path(__file__).with_name("down_of_one.cu")
RING = 27  # steps of a block. More loads in flight are slower: neighbouring lines are then asked for further apart
FEW_WARPS, FEW_BLOCKS, FEW_STAGES = 4, 4, 3  # of a block that waits for its copies most of the time: more of them
STEP_BYTES, TILE, BUFFERS = 16 * BLOCK, 8, 4  # as in the source
SUM_BYTES = 16 * TILE * 4  # of a warp's part of an item


def blocks_per_multiprocessor(warps: int, tiles: int) -> int:
    """At least as in the source: two, if their registers suffice, or four of few warps."""
    if tiles == 1 and warps == FEW_WARPS:
        return FEW_BLOCKS
    return 2 if tiles == 1 and warps <= MAX_CUDA_WARPS else 1


def blocks_of(columns: int, processors: int) -> int:
    """Of a launch for few tokens."""
    return processors * blocks_per_multiprocessor(geometry(columns, 1)[0], 1)


def geometry(columns: int, tokens: int) -> tuple[int, int, dict[str, int]]:
    """(warps that multiply, bytes of shared memory, macros) of a launch."""
    steps, tiles = steps_per_warp(columns), -(-tokens // TILE)
    assert steps is not None
    warps = columns // (BLOCK * steps)
    ring = RING if warps <= MAX_CUDA_WARPS else 2 * RING  # such a block has a multiprocessor to itself
    stages = FEW_STAGES if tiles == 1 and warps == FEW_WARPS else min(ring // warps, 8)
    shared_bytes = warps * (stages * STEP_BYTES + BUFFERS * tiles * SUM_BYTES)
    return warps, shared_bytes, {"COLS": columns, "TILES": tiles, "STEPS": steps, "STAGES": stages}


def _product(
    x: Tensor, ids_Tk: Tensor, q: Tensor, scales: Tensor, out: Tensor, macros: dict[str, int], *ending: Any
) -> None:
    (T, K), (E, _, columns) = ids_Tk.shape, q.shape
    warps, shared_bytes, cut = geometry(columns, T)
    macros = cut | macros | {"OUT": out.shape[1], "E": E, "K": K}
    kernel = cuda_kernel(SOURCE, "experts", 32 * (warps + 1), x.device, **macros)
    blocks = multiprocessors(x.device) * blocks_per_multiprocessor(warps, macros["TILES"])
    kernel.launch(
        (blocks, 1, 1), shared_bytes, x, ids_Tk, q, scales, out, *ending, (c_longlong, x.stride(0)), (c_int, T)
    )


def run_gate_up(x_TD: Tensor, ids_Tk: Tensor, q_E2ID: Tensor, s_gate_up: Tensor, *, num_shared: int) -> Tensor:
    """h [T * k, I] bf16 = silu(gate x) * up x of every pair."""
    h_PI = torch.empty(ids_Tk.numel(), q_E2ID.shape[1] // 2, dtype=x_TD.dtype, device=x_TD.device)
    _product(x_TD, ids_Tk, q_E2ID, s_gate_up, h_PI, {"GATED": 1, "SHARED": num_shared, "ENDS": 0})
    return h_PI


def run_routed_gate_up(
    x_TD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    router_ED: Tensor,
    bias_E: Tensor,
    K: int,
    router_scale: float,
    q_E2ID: Tensor,
    s_gate_up: Tensor,
    *,
    num_shared: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As run_gate_up of the norm of one token x, and the choice of its experts: (h, weights_Tk, ids_Tk)."""
    D, I, k, device = x_TD.shape[1], q_E2ID.shape[1] // 2, K + num_shared, x_TD.device
    h_PI = torch.empty(k, I, dtype=x_TD.dtype, device=device)
    weights_Tk = torch.empty(1, k, dtype=torch.float32, device=device)
    ids_Tk = torch.empty(1, k, dtype=torch.int64, device=device)
    further = (
        norm_weight_D,
        router_ED,
        bias_E,
        told_logits("fp8", D, device, len(bias_E)),
        weights_Tk,
        (c_float, eps),
        (c_float, router_scale),
    )
    macros = {"GATED": 1, "SHARED": num_shared, "ENDS": 0, "ROUTES": 1}
    _product(x_TD, ids_Tk, q_E2ID, s_gate_up, h_PI, macros, *further)
    return h_PI, weights_Tk, ids_Tk


def run_down(
    h_PI: Tensor,
    ids_Tk: Tensor,
    q_EDI: Tensor,
    s_down: Tensor,
    weights_Tk: Tensor | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """With weights y [T, D], the weighted sum over a token's experts of down h, plus the residual; without them what
    every pair adds to it, [T * k, D] fp32."""
    T, D = len(ids_Tk), q_EDI.shape[1]
    parts_PD = torch.empty(len(h_PI), D, dtype=torch.float32, device=h_PI.device)
    y_TD, ends = parts_PD, weights_Tk is not None
    if ends:
        y_TD = torch.empty(T, D, dtype=h_PI.dtype, device=h_PI.device)
    ending = (
        parts_PD if weights_Tk is None else weights_Tk,
        (c_longlong, 0) if residual_TD is None else residual_TD,
        y_TD,
        arrivals(h_PI.device, MAX_TOKENS * D),
        (c_longlong, 0 if residual_TD is None else residual_TD.stride(0)),
    )
    _product(h_PI, ids_Tk, q_EDI, s_down, parts_PD, {"GATED": 0, "SHARED": 0, "ENDS": int(ends)}, *ending)
    return y_TD


def one_shared_bytes(columns: int, K: int) -> int:
    """Bytes of shared memory of a block of `run_down_of_one`: the ring, sums, and h of K experts."""
    return geometry(columns, 1)[1] + 2 * K * columns


def run_down_of_one(
    h_kI: Tensor, ids_1k: Tensor, q_EDI: Tensor, s_down: Tensor, weights_1k: Tensor, residual_1D: Tensor
) -> Tensor:
    """run_down of one token that takes all of its experts here: y [1, D] in bf16, the weighted sum of the rows of h
    [k, I], bf16, times down [E, D, I], e4m3, plus the residual. The bits are run_down's."""
    (k, columns), D, device = h_kI.shape, q_EDI.shape[1], h_kI.device
    warps, _, cut = geometry(columns, 1)
    blocks = blocks_of(columns, multiprocessors(device))
    macros = {"COLS": columns, "OUT": D, "K": k, "STEPS": cut["STEPS"], "STAGES": cut["STAGES"]}
    kernel = cuda_kernel(ONE_SOURCE, "down", 32 * (warps + 1), device, **macros, MOST_ROWS=-(-D // blocks))
    y_1D = torch.empty(1, D, dtype=h_kI.dtype, device=device)
    grid, shared_bytes = (blocks, 1, 1), one_shared_bytes(columns, k)
    kernel.launch(
        grid, shared_bytes, h_kI, ids_1k, q_EDI, s_down, weights_1k, residual_1D, y_1D, (c_longlong, h_kI.stride(0))
    )
    return y_1D


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
) -> Tensor:
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if len(x_TD) == 0:
        return out_TD if finish is None else finish(out_TD)
    h_PI = run_gate_up(x_TD.contiguous(), ids_Tk, *gate_up, num_shared=num_shared)
    q_EDI, s_down = down
    if finish is None and x_TD.shape[1] >= ENDING_COLUMNS:
        return run_down(h_PI, ids_Tk, q_EDI, s_down, weights_Tk, residual_TD)
    y_PD = run_down(h_PI, ids_Tk, q_EDI, s_down)
    if finish is not None:
        return finish(y_PD, weights_Tk=weights_Tk)
    return weighted_sum(y_PD, weights_Tk, out_TD, residual_TD)
