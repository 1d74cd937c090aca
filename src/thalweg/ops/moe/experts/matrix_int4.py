"""Experts in int4 for the many tokens of a prompt at the rate of Hopper's matrix unit: pairs sorted by expert, two
grouped products in CUDA C++ (matrix_int4.cu says how they work), and the weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_longlong
from pathlib import Path

import torch
from torch import Tensor

from thalweg.ops.moe.experts import Finish
from thalweg.ops.moe.experts.sort import Groups, sort_pairs
from thalweg.ops.moe.experts.triton.grouped import in_slices
from thalweg.ops.moe.experts.triton.nibbles import in_order_of_pairs
from thalweg.ops.norm import NextNorm
from thalweg.ops.toolchain.cuda_build import cuda_kernel

SOURCE = Path(__file__).with_name("matrix_int4.cu")
TOKENS, UNIT = 128, 32  # of a block at most, and the multiple that its products are made for
STEP, THREADS, STAGES = 128, 384, 4
STAGE_BYTES = 2 * TOKENS * STEP + 256 * STEP // 2 + 256 * STEP // 16


def product(rows: Tensor, groups: Groups, weights: tuple[Tensor, ...], out: Tensor, *, gated: bool, share: int) -> None:
    """Of sorted pairs: h [pairs, I], by expert, of ordered x, `share` pairs per row; or y [pairs, D], by token, of
    h."""
    columns, width = rows.shape[1], out.shape[1]
    macros = {"GATED": int(gated), "COLS": columns, "OUT": width, "STAGES": STAGES}
    kernel = cuda_kernel(SOURCE, "product", THREADS, rows.device, **macros)
    blocks = len(groups.blocks_N3) * (width // (128 if gated else 256))
    strides = (c_longlong, rows.stride(0)), (c_int, share)
    kernel.launch((blocks, 1, 1), STAGES * STAGE_BYTES, rows, *groups[:2], *weights, out, *strides)


def two_products(
    product: Callable[..., None],
    x_TD: Tensor,
    ids_Tk: Tensor,
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    tokens: int,
    unit: int,
) -> Tensor:
    """y [T * k, D], by token, of gate and up and of down by `product`, whose blocks have up to `tokens` pairs of an
    expert, in multiples of `unit`."""
    E, D, I = down[0].shape[0], down[0].shape[1], gate_up[0].shape[1] // 2
    groups = sort_pairs(ids_Tk, E, tokens, unit)
    h_PI, y_PD = (torch.empty(ids_Tk.numel(), width, dtype=x_TD.dtype, device=x_TD.device) for width in (I, D))
    product(in_order_of_pairs(x_TD), groups, gate_up, h_PI, gated=True, share=ids_Tk.shape[1])
    product(h_PI, groups, down, y_PD, gated=False, share=1)
    return y_PD


def experts(
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
    next_norm: NextNorm | None = None,
    finish: Finish | None = None,
) -> Tensor:
    def outputs(x: Tensor, ids: Tensor) -> Tensor:
        return two_products(product, x, ids, gate_up, down, TOKENS, UNIT)

    return in_slices(outputs, x_TD, weights_Tk, ids_Tk, residual_TD, own, scale, next_norm, finish)
