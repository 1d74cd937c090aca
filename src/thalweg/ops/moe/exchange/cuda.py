"""Launches the exchange of a few tokens by peer memory (dispatch.cu, combine.cu and ranks.cuh say how it works)."""

from __future__ import annotations

from ctypes import c_int, c_longlong
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.all_reduce import AREAS, ROWS
from thalweg.ops.all_reduce.cuda import chunks_of, threads_of
from thalweg.ops.moe.exchange import Gathered, Ranks
from thalweg.ops.toolchain.cuda_build import aligned_rows, cuda_kernel
from thalweg.ops.toolchain.triton_support import multiprocessors

DISPATCH, COMBINE = (Path(__file__).with_name(f"{name}.cu") for name in ("dispatch", "combine"))
UNIT = 4  # columns of a thread that dispatches, or one expert
# Threads of its block. With few, a block of the experts' first launch finds room for its registers beside it.
FEW_THREADS, THREADS = 128, 256
AT_ONCE = 1 << 17  # threads that a device runs at the same time if half of its registers do for each


def _blocks(D: int, each: int, threads: int = THREADS) -> int:
    """Of a token that is dispatched."""
    return -(-(D // UNIT + each) // threads)


def most_dispatched(D: int, each: int) -> int:
    """Tokens of a rank."""
    return AREAS[ROWS][0] // _blocks(D, each)


def most_combined(D: int) -> int:
    """Tokens of a rank whose sums of D columns come back at a time."""
    return AREAS[ROWS][0] // chunks_of(D)


def _ways(blocks: int, threads: int, ranks: int) -> int:
    """By how many ranks a block that combines has its threads, as long as all blocks run at the same time."""
    return max(1, min(ranks, 1024 // threads, AT_ONCE // (blocks * threads)))


def _exchange(ranks: Ranks) -> tuple[dict[str, int], tuple[Any, ...]]:
    """Macros and arguments of a kernel that includes ranks.cuh."""
    assert ranks.peers is not None
    table, blocks, place_bytes = ranks.peers.areas[ROWS]
    return {"RANKS": ranks.size, "RANK": ranks.rank}, (table, (c_longlong, blocks * place_bytes))


def dispatch(
    x_TD: Tensor, weights_Tk: Tensor, slots_Tk: Tensor, live_T: Tensor, ranks: Ranks, *, here: int, shared: int
) -> Gathered:
    (T, D), k, device = x_TD.shape, slots_Tk.shape[1], x_TD.device
    A = ranks.size * T
    x_AD = torch.empty(A, D, dtype=x_TD.dtype, device=device)
    weights_Ak = torch.empty(A, k, dtype=torch.float32, device=device)
    ids_Ak = torch.empty(A, k, dtype=torch.int64, device=device)
    if T == 0:
        return Gathered(x_AD, weights_Ak, ids_Ak)
    x_TD = aligned_rows(x_TD)
    exchange, arguments = _exchange(ranks)
    threads = FEW_THREADS if T * _blocks(D, k, FEW_THREADS) <= multiprocessors(device) else THREADS
    macros = {"D": D, "K": k - shared, "SHARED": shared, "HERE": here, "BLOCK": threads}
    cuda_kernel(DISPATCH, "dispatch", threads, device, **macros, **exchange).launch(
        (T * _blocks(D, k, threads), 1, 1),
        0,
        x_TD,
        weights_Tk,
        slots_Tk,
        live_T,
        x_AD,
        weights_Ak,
        ids_Ak,
        (c_int, T),
        (c_longlong, x_TD.stride(0)),
        *arguments,
    )
    return Gathered(x_AD, weights_Ak, ids_Ak)


def combine(
    residual_TD: Tensor,
    parts_PD: Tensor,
    ranks: Ranks,
    *,
    weights_Ak: Tensor | None = None,
    own_TD: Tensor | None = None,
) -> Tensor:
    T, D = residual_TD.shape
    y_TD = torch.empty(T, D, dtype=residual_TD.dtype, device=residual_TD.device)
    if T == 0:
        return y_TD
    residual_TD, threads, blocks = aligned_rows(residual_TD), threads_of(D), T * chunks_of(D)
    exchange, arguments = _exchange(ranks)
    macros = {
        "D": D,
        "PARTS": 1 if weights_Ak is None else weights_Ak.shape[1],
        "WEIGHTED": int(weights_Ak is not None),
        "WIDE": int(parts_PD.dtype == torch.float32),
        "OWN": int(own_TD is not None),
        "BLOCK": threads,
        "WAYS": _ways(blocks, threads, ranks.size),
    }
    cuda_kernel(COMBINE, "combine", threads * macros["WAYS"], y_TD.device, **macros, **exchange).launch(
        (blocks, 1, 1),
        0,
        parts_PD,
        parts_PD if weights_Ak is None else weights_Ak,
        residual_TD,
        parts_PD if own_TD is None else own_TD,
        y_TD,
        (c_int, T),
        (c_longlong, residual_TD.stride(0)),
        *arguments,
    )
    return y_TD
