"""Launches the gathering of few rows from all ranks (rows.cu and ranks.cuh say how it works)."""

from __future__ import annotations

from ctypes import c_int, c_longlong
from pathlib import Path

from torch import Tensor

from thalweg.ops.all_reduce import AREAS, ROWS, Ranks
from thalweg.ops.all_reduce.cuda import exchange_arguments
from thalweg.ops.toolchain.cuda_build import cuda_kernel

SOURCE = Path(__file__).with_name("rows.cu")
UNIT, THREADS = 8, 256  # bytes of a thread, threads of a block
MOST_BYTES = 4 << 20  # that a rank gives to others: beyond, writing them twice as long takes longer


def chunks_of(row_bytes: int) -> int:
    """Blocks of a row."""
    return -(-row_bytes // (UNIT * THREADS))


def most_rows(row_bytes: int, ranks: int) -> int:
    return min(AREAS[ROWS][0] // chunks_of(row_bytes), MOST_BYTES // (row_bytes * (ranks - 1)))


def all_gather(x_RN: Tensor, ranks: Ranks) -> Tensor:
    R, N = x_RN.shape
    y = x_RN.new_empty(R, ranks.tp_size * N)
    row_bytes = N * x_RN.element_size()
    if R == 0:
        return y
    if x_RN.stride(0) * x_RN.element_size() % UNIT or x_RN.data_ptr() % UNIT:
        x_RN = x_RN.clone()
    exchange, arguments = exchange_arguments(ranks, ROWS)
    chunks = chunks_of(row_bytes)
    cuda_kernel(SOURCE, "gather_rows", THREADS, y.device, BLOCK=THREADS, **exchange).launch(
        (R * chunks, 1, 1),
        0,
        x_RN,
        y,
        (c_int, row_bytes // UNIT),
        (c_int, chunks),
        (c_longlong, x_RN.stride(0) * x_RN.element_size() // UNIT),
        *arguments,
    )
    return y
