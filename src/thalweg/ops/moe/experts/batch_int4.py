"""Experts in int4 for batches, in which an expert has up to some ten tokens: pairs sorted by expert, two grouped
products in CUDA C++ (batch_int4.cu says how they work), and the weighted sum."""

from __future__ import annotations

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
from thalweg.ops.toolchain.tensor_map import tensor_map
from thalweg.ops.toolchain.triton_support import multiprocessors

SOURCE = Path(__file__).with_name("batch_int4.cu")
THREADS, STAGES = 640, 4
TOKENS, UNIT = 32, 16  # of a tile at most, and the multiple that its products are made for
STAGE_BYTES = 512 * TOKENS + 256 * 128 + 256 * 16  # tokens, words and scales


def product(rows: Tensor, groups: Groups, weights: tuple[Tensor, ...], out: Tensor, *, gated: bool, share: int) -> None:
    """Of sorted pairs: h [pairs, I], by expert, of ordered x, `share` pairs a row; or y [pairs, D], by token, of h.
    Rows of pairs that are left out stay as they are."""
    (words, scales), device = weights, rows.device
    macros = {"GATED": int(gated), "COLS": rows.shape[1], "OUT": out.shape[1], "TOKENS": TOKENS, "STAGES": STAGES}
    kernel = cuda_kernel(SOURCE, "product", THREADS, device, **macros)
    words_map = (None, tensor_map(words.view(torch.bfloat16).flatten(0, 1).unsqueeze(1), 128))
    numbers = (c_longlong, rows.stride(0)), (c_int, share), (c_int, len(groups.blocks_N3))
    operands = words_map, rows, *groups[:2], scales, out
    kernel.launch((multiprocessors(device), 1, 1), STAGES * STAGE_BYTES, *operands, *numbers)


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
        E, D, I = down[0].shape[0], down[0].shape[1], gate_up[0].shape[1] // 2
        groups = sort_pairs(ids, E, TOKENS, UNIT)
        h_PI, y_PD = (torch.empty(ids.numel(), width, dtype=x.dtype, device=x.device) for width in (I, D))
        product(in_order_of_pairs(x), groups, gate_up, h_PI, gated=True, share=ids.shape[1])
        product(h_PI, groups, down, y_PD, gated=False, share=1)
        return y_PD

    return in_slices(outputs, x_TD, weights_Tk, ids_Tk, residual_TD, own, scale, next_norm, finish)
