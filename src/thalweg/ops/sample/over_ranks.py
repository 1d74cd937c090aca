"""Samples from logits of which ranks have parts: each finds the best of its blocks in Triton, and a kernel in CUDA C++
exchanges and chooses (over_ranks.cu)."""

from __future__ import annotations

from ctypes import c_int
from pathlib import Path

import torch
from torch import Tensor

from thalweg.ops.all_reduce import ROWS, Ranks
from thalweg.ops.all_reduce.cuda import exchange_arguments
from thalweg.ops.toolchain.cuda_build import cuda_kernel

SOURCE = Path(__file__).with_name("over_ranks.cu")


def sample_over_ranks(
    logits_RV: Tensor,
    temperatures_N: Tensor,
    seeds_N: Tensor,
    positions_R: Tensor,
    slots_R: Tensor,
    ranks: Ranks,
    *,
    vocab: int,
) -> Tensor:
    from thalweg.ops.sample.triton import best_of_blocks

    first = ranks.tp_rank * logits_RV.shape[1]
    part_RV = logits_RV[:, : vocab - first]
    best = best_of_blocks(part_RV, temperatures_N, seeds_N, positions_R, slots_R, check=True, first=first)
    return choose(*best, ranks)


def choose(values_RB: Tensor, ids_RB: Tensor, ranks: Ranks) -> Tensor:
    """ids [R] of the best of all ranks' blocks, whose values are fp32 and ids int32, in the order of ids."""
    R, blocks = values_RB.shape
    out_R = torch.empty(R, dtype=torch.int64, device=values_RB.device)
    if R:
        exchange, arguments = exchange_arguments(ranks, ROWS)
        cuda_kernel(SOURCE, "choose_over_ranks", 32, out_R.device, **exchange).launch(
            (R, 1, 1), 0, values_RB, ids_RB, out_R, (c_int, blocks), *arguments
        )
    return out_R
