"""Launches the exchange of tokens by peer memory (dispatch.cu, combine.cu and ranks.cuh say how it works)."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_longlong
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.all_reduce import MANY_TOKENS, ROWS, Area
from thalweg.ops.all_reduce.cuda import EACH, MANY_THREADS, chunks_of, of_rank, threads_of
from thalweg.ops.moe.exchange import Gathered, Ranks, reference
from thalweg.ops.toolchain.cuda_build import CudaKernel, aligned_rows, cuda_kernel
from thalweg.ops.toolchain.triton_support import multiprocessors

DISPATCH, COMBINE, DISPATCH_MANY, COMBINE_MANY = (
    Path(__file__).with_name(f"{name}.cu") for name in ("dispatch", "combine", "dispatch_many", "combine_many")
)
UNIT = 4  # columns of a thread that dispatches, or one expert
# Threads of its block. With few, a block of the experts' first launch finds room for its registers beside it.
FEW_THREADS, THREADS = 128, 256
AT_ONCE = 1 << 17  # threads that a device runs at the same time if half of its registers do for each
MANY = {"BLOCK": MANY_THREADS, "PER": 2, "NAP": 100}  # as sums of many tokens: a place of the area is of one block


def _exchange(ranks: Ranks, area: int) -> tuple[dict[str, int], tuple[Any, ...], Area]:
    """Macros and arguments of a kernel that includes ranks.cuh, and the area where its blocks meet."""
    assert ranks.peers is not None
    found = ranks.peers.areas[area]
    return (
        {"RANKS": ranks.size, "RANK": ranks.rank},
        (found.table, (c_longlong, found.blocks * found.place_bytes)),
        found,
    )


def dispatch(
    live_R: Tensor,
    x_TD: Tensor,
    weights_Tk: Tensor,
    slots_Tk: Tensor,
    ranks: Ranks,
    *,
    here: int,
    shared: int,
    many: bool = False,
) -> Gathered:
    (T, D), k, R, device = x_TD.shape, slots_Tk.shape[1], len(live_R), x_TD.device
    A = ranks.size * R
    x_AD = torch.empty(A, D, dtype=x_TD.dtype, device=device)
    weights_Ak = torch.empty(A, k, dtype=torch.float32, device=device)
    ids_Ak = torch.empty(A, k, dtype=torch.int64, device=device)
    x_TD = aligned_rows(x_TD)
    exchange, meeting, area = _exchange(ranks, MANY_TOKENS if many else ROWS)
    macros = {"D": D, "K": k - shared, "SHARED": shared, "HERE": here, **exchange}
    tensors = x_TD, weights_Tk, slots_Tk, live_R, x_AD, weights_Ak, ids_Ak
    numbers = (c_int, T), (c_int, R), (c_longlong, x_TD.stride(0)), *meeting
    if many:
        kernel = cuda_kernel(DISPATCH_MANY, "dispatch_many", MANY_THREADS, device, **macros, **MANY)
        _launch_many(kernel, R, D // EACH + -(-k // 2), area, tensors, *numbers)
    else:
        threads = FEW_THREADS if R * _blocks(D, k, FEW_THREADS) <= multiprocessors(device) else THREADS
        kernel = cuda_kernel(DISPATCH, "dispatch", threads, device, **macros, BLOCK=threads)
        _launch(kernel, R, _blocks(D, k, threads), area, tensors, *numbers)
    return Gathered(x_AD, weights_Ak, ids_Ak)


def combine(
    live_R: Tensor,
    residual_TD: Tensor,
    parts_PD: Tensor,
    ranks: Ranks,
    *,
    weights_Ak: Tensor | None = None,
    own_TD: Tensor | None = None,
    many: bool = False,
) -> Tensor:
    (T, D), R = residual_TD.shape, len(live_R)
    y_TD = torch.empty(T, D, dtype=residual_TD.dtype, device=residual_TD.device)
    residual_TD = aligned_rows(residual_TD)
    exchange, meeting, area = _exchange(ranks, MANY_TOKENS if many else ROWS)
    macros = {
        "D": D,
        "PARTS": 1 if weights_Ak is None else weights_Ak.shape[1],
        "WEIGHTED": int(weights_Ak is not None),
        "WIDE": int(parts_PD.dtype == torch.float32),
        "OWN": int(own_TD is not None),
        **exchange,
    }
    weights, own = (parts_PD if given is None else given for given in (weights_Ak, own_TD))
    tensors = parts_PD, weights, residual_TD, own, y_TD
    numbers = (c_int, T), (c_int, R), (c_longlong, residual_TD.stride(0)), *meeting
    if many:
        kernel = cuda_kernel(COMBINE_MANY, "combine_many", MANY_THREADS, y_TD.device, **macros, **MANY)
        _launch_many(kernel, R, D // EACH, area, tensors, *numbers)
    else:
        threads, blocks = threads_of(D), min(R * chunks_of(D), area.blocks)
        ways = _ways(blocks, threads, ranks.size)
        kernel = cuda_kernel(COMBINE, "combine", threads * ways, y_TD.device, **macros, BLOCK=threads, WAYS=ways)
        _launch(kernel, R, chunks_of(D), area, tensors, *numbers)
    return y_TD


def _blocks(D: int, each: int, threads: int) -> int:
    """Of a token that is dispatched."""
    return -(-(D // UNIT + each) // threads)


def _ways(blocks: int, threads: int, ranks: int) -> int:
    """By how many ranks a block that combines has its threads, as long as all blocks run at the same time."""
    return max(1, min(ranks, 1024 // threads, AT_ONCE // (blocks * threads)))


def _launch(kernel: CudaKernel, rows: int, each: int, area: Area, tensors: Sequence[Tensor], *numbers: Any) -> None:
    """For so many rows of each rank, of `each` blocks, in as many launches as the area makes necessary."""
    step = area.blocks // each
    for first in range(0, rows, step):
        kernel.launch((min(step, rows - first) * each, 1, 1), 0, *tensors, (c_int, first), *numbers)


def _launch_many(
    kernel: CudaKernel, rows: int, each: int, area: Area, tensors: Sequence[Tensor], *numbers: Any
) -> None:
    """The same of rows that take `each` times 16 bytes."""
    step = area.blocks * area.place_bytes // (16 * each)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        kernel.launch((area.blocks, 1, 1), 0, *tensors, (c_int, first), (c_int, count), *numbers)


def combine_separate(
    live_R: Tensor,
    residual_TD: Tensor,
    parts_PD: Tensor,
    ranks: Ranks,
    *,
    weights_Ak: Tensor | None = None,
    own_TD: Tensor | None = None,
) -> Tensor:
    """By the ranks' own collective."""
    if weights_Ak is not None:
        shape = len(weights_Ak), residual_TD.shape[1]
        sums_AD = torch.empty(shape, dtype=residual_TD.dtype, device=residual_TD.device)
        parts_PD = of_rank(sums_AD, parts_PD, weights_Ak, None, 1.0)
    return reference.combine(live_R, residual_TD, parts_PD, ranks, own_TD=own_TD)
