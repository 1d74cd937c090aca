"""Experts for a few tokens, in three launches: gate and up with SiLU, down, and the weighted sum.

One program takes a few rows of one (token, expert) pair. The sum has one fixed order, in a launch of its own: leaving
it to the last program of a token to finish took longer. A weight in fp8 goes to fp32 in registers, and its scale is
applied once to the products of a block of 128 columns, of which a program's rows have one each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thalweg.ops.moe.experts import Finish
from thalweg.ops.moe.experts.triton.products import BLOCK, silu_and_mul
from thalweg.ops.moe.experts.triton.weighted_sum import weighted_sum
from thalweg.ops.toolchain.triton_launch import pdl_options


@triton.jit
def _load_row_tiles(w_ptrs, cols, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows at w_ptrs as a tuple of tiles of BLOCK_D columns, held in registers."""
    tiles = ()
    for c in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        if (c + 1) * BLOCK_D <= D:
            tiles = tiles + (tl.load(w_ptrs + c * BLOCK_D),)
        else:
            tiles = tiles + (tl.load(w_ptrs + c * BLOCK_D, mask=c * BLOCK_D + cols[None, :] < D, other=0.0),)
    return tiles


@triton.jit
def _load_scales(s_ptr, count: tl.constexpr):
    scales = ()
    for c in tl.static_range(count):
        scales = scales + (tl.load(s_ptr + c),)
    return scales


@triton.jit
def _add_products(acc, w, x, scales, c: tl.constexpr):
    """acc [rows, n] plus the products of tile c, [rows, columns]. With scales, those of columns / n neighbours, which
    few threads hold, are summed before they take one."""
    products = w.to(tl.float32) * x
    if len(scales) > 0:
        run: tl.constexpr = w.shape[1] // acc.shape[1]
        products = tl.sum(tl.reshape(products, [w.shape[0], acc.shape[1], run]), 2) * scales[c]
    return acc + products


@triton.jit
def gate_up_pair_kernel(
    x_ptr,
    ids_ptr,
    w_ptr,  # [E, 2I, D]
    s_ptr,  # [E, 2 * blocks of I, blocks of D], or None
    h_ptr,  # [T * K, I]
    pairs,
    x_stride,
    E: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,  # whether pairs may be left out
    BLOCK_I: tl.constexpr,  # divides BLOCK if there are scales, so that a program's rows lie in one row of blocks
    BLOCK_D: tl.constexpr,  # BLOCK if there are scales
    PDL: tl.constexpr,
):
    blocks: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    # Backwards, so that the shared experts come first: their weights are known before the router is done.
    pair = pairs - 1 - tl.program_id(0) // blocks
    expert = E - K + pair % K
    if pair % K < K - SHARED:
        if PDL:
            gdc_wait()
        expert = tl.load(ids_ptr + pair).to(tl.int32)
    if MASKED:
        if expert < 0:
            return
    first = (tl.program_id(0) % blocks) * BLOCK_I
    rows = first + tl.arange(0, BLOCK_I)
    cols = tl.arange(0, BLOCK_D)
    gate_ptrs = w_ptr + (expert.to(tl.int64) * (2 * I) + tl.minimum(rows, I - 1))[:, None] * D + cols[None, :]
    gate_tiles = _load_row_tiles(gate_ptrs, cols, D, BLOCK_D)
    up_tiles = _load_row_tiles(gate_ptrs + I * D, cols, D, BLOCK_D)
    gate_scales, up_scales = (), ()
    if s_ptr is not None:
        blocks_d: tl.constexpr = (D + BLOCK - 1) // BLOCK
        blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
        s_ptr += (expert * 2 * blocks_i + first // BLOCK) * blocks_d
        gate_scales = _load_scales(s_ptr, blocks_d)
        up_scales = _load_scales(s_ptr + blocks_i * blocks_d, blocks_d)
    if PDL:
        # Only now may "down" start: it reads ids before its own wait, and they are complete here.
        gdc_wait()
        gdc_launch_dependents()
    x_tiles = _load_row_tiles(x_ptr + (pair // K) * x_stride + (rows * 0)[:, None] + cols[None, :], cols, D, BLOCK_D)
    sums: tl.constexpr = BLOCK_D if s_ptr is None else BLOCK_D // 16
    gate = tl.zeros([BLOCK_I, sums], tl.float32)
    up = tl.zeros([BLOCK_I, sums], tl.float32)
    for c in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        x = x_tiles[c].to(tl.float32)
        gate = _add_products(gate, gate_tiles[c], x, gate_scales, c)
        up = _add_products(up, up_tiles[c], x, up_scales, c)
    h = silu_and_mul(tl.sum(gate, 1), tl.sum(up, 1))
    tl.store(h_ptr + pair * I + rows, h.to(h_ptr.dtype.element_ty), mask=rows < I)


@triton.jit
def down_pair_kernel(
    h_ptr,
    ids_ptr,
    w_ptr,  # [E, D, I]
    s_ptr,  # [E, blocks of D, blocks of I], or None
    y_ptr,  # [T * K, D] fp32
    D: tl.constexpr,
    I: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_D: tl.constexpr,  # divides BLOCK if there are scales
    BLOCK_I: tl.constexpr,  # BLOCK if there are scales
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pair = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK_D
    rows = first + tl.arange(0, BLOCK_D)
    cols = tl.arange(0, BLOCK_I)
    # The ids are complete: "gate_up" lets this kernel start only after its own wait for them. Not from L1, which may
    # hold what was there before.
    expert = tl.load(ids_ptr + pair, cache_modifier=".cg").to(tl.int64)
    if MASKED:
        if expert < 0:
            if PDL:
                gdc_wait()
            return
    w_ptrs = w_ptr + (expert * D + tl.minimum(rows, D - 1))[:, None] * I + cols[None, :]
    tiles = _load_row_tiles(w_ptrs, cols, I, BLOCK_I)
    scales = ()
    if s_ptr is not None:
        blocks_i: tl.constexpr = (I + BLOCK - 1) // BLOCK
        row = expert * ((D + BLOCK - 1) // BLOCK) + first // BLOCK
        scales = _load_scales(s_ptr + row * blocks_i, blocks_i)
    if PDL:
        gdc_wait()
    h_tiles = _load_row_tiles(h_ptr + pair * I + (rows * 0)[:, None] + cols[None, :], cols, I, BLOCK_I)
    sums: tl.constexpr = BLOCK_I if s_ptr is None else BLOCK_I // 16
    acc = tl.zeros([BLOCK_D, sums], tl.float32)
    for c in tl.static_range((I + BLOCK_I - 1) // BLOCK_I):
        acc = _add_products(acc, tiles[c], h_tiles[c].to(tl.float32), scales, c)
    tl.store(y_ptr + pair * D + rows, tl.sum(acc, 1), mask=rows < D)


def experts_of_pairs(
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
    h_PI = run_gate_up(x_TD, ids_Tk, *gate_up, num_shared=num_shared, masked=finish is not None)
    y_PD = run_down(h_PI, ids_Tk, *down, masked=finish is not None)
    if finish is not None:
        return finish(y_PD, weights_Tk=weights_Tk)
    return weighted_sum(y_PD, weights_Tk, out_TD, residual_TD)


def run_gate_up(
    x_TD: Tensor, ids_Tk: Tensor, w_E2ID: Tensor, scales: Tensor | None = None, *, num_shared: int, masked: bool = False
) -> Tensor:
    """h [T * k, I] = silu(gate x) * up x of every pair, in x's dtype."""
    (E, I2, D), (T, K) = w_E2ID.shape, ids_Tk.shape
    I = I2 // 2
    rows, columns = (2, 512) if scales is None else (8, BLOCK.value)
    h_PI = torch.empty(T * K, I, dtype=x_TD.dtype, device=x_TD.device)
    gate_up_pair_kernel[(T * K * triton.cdiv(I, rows),)](
        x_TD,
        ids_Tk,
        w_E2ID,
        scales,
        h_PI,
        T * K,
        x_TD.stride(0),
        E=E,
        D=D,
        I=I,
        K=K,
        SHARED=num_shared,
        MASKED=masked,
        BLOCK_I=rows,
        BLOCK_D=columns,
        num_warps=4,
        **pdl_options(x_TD),
    )
    return h_PI


def run_down(
    h_PI: Tensor, ids_Tk: Tensor, w_EDI: Tensor, scales: Tensor | None = None, *, masked: bool = False
) -> Tensor:
    """y [T * k, D] fp32 = down h of every pair."""
    _, D, I = w_EDI.shape
    P, rows = ids_Tk.numel(), 16
    columns, warps = (256, 4) if scales is None else (BLOCK.value, 2)
    y_PD = torch.empty(P, D, dtype=torch.float32, device=h_PI.device)
    down_pair_kernel[(P * triton.cdiv(D, rows),)](
        h_PI,
        ids_Tk,
        w_EDI,
        scales,
        y_PD,
        D=D,
        I=I,
        MASKED=masked,
        BLOCK_D=rows,
        BLOCK_I=columns,
        num_warps=warps,
        **pdl_options(h_PI),
    )
    return y_PD
