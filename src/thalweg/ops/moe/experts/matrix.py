"""Experts for the many tokens of a prompt at the rate of Hopper's matrix unit (ops/products says how it works): pairs
sorted by expert, two grouped products in CUDA C++, and the weighted sum.

Over fp8, x and h go to fp8 as well, each row with a scale of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.ops.moe.experts import Finish
from thalweg.ops.moe.experts.sort import sort_pairs
from thalweg.ops.moe.experts.triton.grouped import in_slices
from thalweg.ops.norm import NextNorm
from thalweg.ops.products.cuda import UNIT, grouped, most_rows
from thalweg.ops.products.triton import quantize_rows
from thalweg.ops.toolchain.cuda_build import aligned_rows
from thalweg.ops.toolchain.triton_compile import rehearsing

MIN_EARLY = 5 * 64  # columns of x: a tile of gate and up has more steps than stages then


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
    is_fp8 = len(down) == 2
    E, D, I = down[0].shape
    most, k = most_rows(gate_up[0].element_size()), ids_Tk.shape[1]

    def outputs(x: Tensor, ids: Tensor) -> Tensor:
        if rehearsing() and not is_fp8:  # a step may have more tokens than the longest that is rehearsed
            in_clusters(x, ids, 1)
            return in_clusters(x, ids, 2)
        # Halves of fewer rows would wait for weights; those of fp8 have half of the bytes, and are quicker alone.
        return in_clusters(x, ids, 2 if ids.numel() > E * most and not is_fp8 else 1)

    def in_clusters(x: Tensor, ids: Tensor, cluster: int) -> Tensor:
        groups = sort_pairs(ids, E, cluster * most, UNIT)
        h_PI = torch.empty(ids.numel(), I, dtype=x.dtype, device=x.device)
        y_PD = torch.empty(ids.numel(), D, dtype=x.dtype, device=x.device)
        early = cluster == 1 and not is_fp8 and D > MIN_EARLY and I % 8 == 0  # in clusters it is slower
        for rows, weights, out in ((x, gate_up, h_PI), (h_PI, down, y_PD)):
            rows, scales = quantize_rows(rows)[:2] if is_fp8 else (aligned_rows(rows), None)
            grouped(rows, weights, *groups[:2], out, scales, gated=out is h_PI, share=k, cluster=cluster, early=early)
        return y_PD

    return in_slices(outputs, x_TD, weights_Tk, ids_Tk, residual_TD, own, scale, next_norm, finish)
