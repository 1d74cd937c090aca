"""Experts in int4 for batches, in which an expert has up to some ten tokens: pairs sorted by expert, two grouped
products in CUDA C++ (batch_int4.cu says how they work), and the weighted sum."""

from __future__ import annotations

from ctypes import c_int, c_longlong
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from thalweg.ops.moe.experts import Finish
from thalweg.ops.moe.experts.matrix_int4 import two_products
from thalweg.ops.moe.experts.sort import Groups
from thalweg.ops.moe.experts.triton.grouped import in_slices
from thalweg.ops.norm import NextNorm
from thalweg.ops.toolchain.cuda_build import cuda_kernel
from thalweg.ops.toolchain.tensor_map import tensor_map
from thalweg.ops.toolchain.triton_support import multiprocessors

SOURCE = Path(__file__).with_name("batch_int4.cu")
THREADS, UNIT = 640, 16  # UNIT divides the tokens of tiles


class Cut(NamedTuple):
    """Tokens of a tile at most, those that a smaller one has, and stages of the ring."""

    tokens: int
    few: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """Of stages of tokens, words and scales."""
        return self.stages * (512 * self.tokens + 256 * 128 + 256 * 16)


def cut_for(T: int) -> Cut:
    """By rows, of which an expert of Kimi-K2 has a 48th on average."""
    if T <= 1408:
        return Cut(32, 8 if T <= 192 else 16 if T <= 576 else 24, 4)
    return Cut(64, 64, 3)


def product(
    rows: Tensor, groups: Groups, weights: tuple[Tensor, ...], out: Tensor, cut: Cut, *, gated: bool, share: int
) -> None:
    """Of sorted pairs, cut.tokens of a block: h [pairs, I], by expert, of ordered x, `share` pairs per row; or y
    [pairs, D], by token, of h. Rows of pairs that are left out stay as they are."""
    (words, scales), device = weights, rows.device
    macros = {"GATED": int(gated), "COLS": rows.shape[1], "OUT": out.shape[1]}
    macros |= {"TOKENS": cut.tokens, "FEW": cut.few, "STAGES": cut.stages}
    kernel = cuda_kernel(SOURCE, "product", THREADS, device, **macros)
    words_map = (None, tensor_map(words.view(torch.bfloat16).flatten(0, 1).unsqueeze(1), 128))
    numbers = (c_longlong, rows.stride(0)), (c_int, share), (c_int, len(groups.blocks_N3))
    operands = words_map, rows, *groups[:2], scales, out
    kernel.launch((multiprocessors(device), 1, 1), cut.shared_bytes, *operands, *numbers)


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
        cut = cut_for(len(ids))
        return two_products(partial(product, cut=cut), x, ids, gate_up, down, cut.tokens, UNIT)

    return in_slices(outputs, x_TD, weights_Tk, ids_Tk, residual_TD, own, scale, next_norm, finish)
