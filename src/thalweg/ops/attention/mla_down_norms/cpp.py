"""Norms and rotation of latent attention on a CPU, in C++ (split.cpp)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.toolchain.cpu_build import DTYPES, function


@cache
def _run() -> Any:
    norms, rotation = (c_int, c_void_p, c_void_p, c_float), (c_void_p, c_void_p, c_float)
    results, sizes = [c_void_p] * 3, [c_int64] * 5
    return function("split_norms", c_int, c_void_p, c_int64, *norms, *rotation, *results, *sizes, c_int)


def split_norms(
    x_TX: Tensor,
    q_weight_Q: Tensor | None,
    kv_weight_R: Tensor,
    eps: float,
    *,
    positions_T: Tensor,
    frequencies_F: Tensor,
    rope_scale: float,
    blocks_MSC: Tensor,
    block_rows_T: Tensor,
) -> Tensor:
    T, Q, R = x_TX.shape[0], 0 if q_weight_Q is None else q_weight_Q.shape[0], kv_weight_R.shape[0]
    q_TQ = x_TX.new_empty(T, Q)
    _run()(
        DTYPES[x_TX.dtype],
        x_TX.data_ptr(),
        x_TX.stride(0),
        DTYPES[kv_weight_R.dtype],
        None if q_weight_Q is None else q_weight_Q.data_ptr(),
        kv_weight_R.data_ptr(),
        eps,
        positions_T.data_ptr(),
        frequencies_F.data_ptr(),
        rope_scale,
        blocks_MSC.data_ptr(),
        block_rows_T.data_ptr(),
        q_TQ.data_ptr(),
        T,
        Q,
        R,
        blocks_MSC.shape[2] - R,
        frequencies_F.shape[0],
        torch.get_num_threads(),
    )
    return q_TQ
