"""Launches the exchange of a few tokens' rows of the vocabulary (rows.cu and ranks.cuh say how it works)."""

from __future__ import annotations

from ctypes import c_longlong
from pathlib import Path

import torch
from torch import Tensor

from thalweg.ops.all_reduce import ROWS, Ranks
from thalweg.ops.all_reduce.cuda import chunks_of, exchange_arguments, threads_of
from thalweg.ops.toolchain.cuda_build import cuda_kernel

SOURCE = Path(__file__).with_name("rows.cu")


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
