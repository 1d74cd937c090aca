"""Launches the sort of (token, expert) pairs by expert (sort.cu says how it works)."""

from __future__ import annotations

from ctypes import c_int
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from thalweg.ops.toolchain.cuda_build import cuda_kernel

SOURCE = Path(__file__).with_name("sort.cu")
BLOCKS, WARPS = 16, 32


class Groups(NamedTuple):
    """Pairs by expert, and blocks of at most `rows` of them of one expert.

    A block is (expert, its first place in sorted_P, how many). There are as many as could be needed; the rest, which
    come last, have 0.
    """

    sorted_P: Tensor  # int32
    blocks_N3: Tensor  # int32
    rows: int


def most_blocks(pairs: int, experts: int, rows: int) -> int:
    """How many blocks pairs can need, however they choose."""
    return pairs // rows + min(experts, pairs)


def shared_bytes(experts: int, of_warp: int) -> int:
    """As the source lays it out."""
    return 4 * (WARPS * experts + experts + WARPS) + 2 * WARPS * of_warp


def sort_pairs(ids_Tk: Tensor, experts: int, rows: int, unit: int) -> Groups:
    """As `sort_pairs` of triton/grouping.py, in one launch; an expert's pairs keep their order.

    Behind the blocks, in the same memory, are two counters of zero, the number of blocks that have pairs, and a count
    of zero for each, for the products of ops/products.
    """
    P, device = ids_Tk.numel(), ids_Tk.device
    sorted_P = torch.empty(P, dtype=torch.int32, device=device)
    most = most_blocks(P, experts, rows)
    blocks_N3 = torch.empty(most + 1 + -(-most // 3), 3, dtype=torch.int32, device=device)[:most]
    of_warp = -(-P // (32 * BLOCKS * WARPS)) * 32
    kernel = cuda_kernel(SOURCE, "sort_pairs", 32 * WARPS, device, E=experts, BLOCKS=BLOCKS, WARPS=WARPS)
    numbers = (P, len(blocks_N3), rows, unit, of_warp)
    kernel.launch(
        (BLOCKS, 1, 1), shared_bytes(experts, of_warp), ids_Tk, sorted_P, blocks_N3, *((c_int, n) for n in numbers)
    )
    return Groups(sorted_P, blocks_N3, rows)
