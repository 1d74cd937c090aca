"""Launches the exchange of rows of the vocabulary (rows.cu, many.cu and ranks.cuh say how it works)."""

from __future__ import annotations

from ctypes import c_int, c_longlong
from pathlib import Path

import torch
from torch import Tensor

from thalweg.ops.all_reduce import MANY_TOKENS, ROWS, Ranks
from thalweg.ops.all_reduce.cuda import chunks_of, exchange_arguments, launches_of_many, threads_of
from thalweg.ops.toolchain.cuda_build import cuda_kernel

SOURCE = Path(__file__).with_name("rows.cu")
OF_MANY, MANY_THREADS, MANY = Path(__file__).with_name("many.cu"), 512, {"PER": 2, "NAP": 100}


def embedding(ids_T: Tensor, w_VD: Tensor, ranks: Ranks) -> Tensor:
    T, (V, D) = len(ids_T), w_VD.shape
    x_TD = torch.empty(T, D, dtype=w_VD.dtype, device=w_VD.device)
    if T == 0:
        return x_TD
    exchange, arguments = exchange_arguments(ranks, ROWS)
    macros = {"D": D, "BLOCK": threads_of(D), **exchange}
    cuda_kernel(SOURCE, "embed", threads_of(D), w_VD.device, **macros).launch(
        (T * chunks_of(D), 1, 1), 0, ids_T.contiguous(), w_VD, x_TD, (c_longlong, V), *arguments
    )
    return x_TD


def embedding_many(ids_T: Tensor, w_VD: Tensor, ranks: Ranks) -> Tensor:
    (V, D), ids_T = w_VD.shape, ids_T.contiguous()
    x_TD = torch.empty(len(ids_T), D, dtype=w_VD.dtype, device=w_VD.device)
    row_bytes = D * x_TD.element_size()
    blocks, rows = launches_of_many(ranks, row_bytes)
    exchange, arguments = exchange_arguments(ranks, MANY_TOKENS)
    macros = {"D": D, "BLOCK": MANY_THREADS, **MANY, **exchange}
    kernel = cuda_kernel(OF_MANY, "embed_many", MANY_THREADS, w_VD.device, **macros)
    for first in range(0, len(ids_T), rows):
        x = x_TD[first : first + rows]
        kernel.launch(
            (blocks, 1, 1), 0, ids_T[first:], w_VD, x, (c_longlong, V), (c_int, len(x) * row_bytes), *arguments
        )
    return x_TD
