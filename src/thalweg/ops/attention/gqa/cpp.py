"""Decode of gated attention on a CPU, in C++ (decode.cpp)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.toolchain.cpu_build import DTYPES, function


@cache
def _run() -> Any:
    norms, rotation = (c_int, c_void_p, c_void_p, c_float), (c_void_p, c_float, c_void_p)
    cache = (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p)
    types = (c_void_p, c_int64, *norms, *rotation, *cache, c_void_p, *[c_int64] * 6, c_int)
    return function("gqa_mixer", c_int, *types)


def gqa_mixer_decode(
    proj_BX: Tensor,
    *,
    q_norm_weight_K: Tensor,
    k_norm_weight_K: Tensor,
    eps: float,
    frequencies_F: Tensor,
    rope_scale: float,
    positions_B: Tensor,
    keys_MSGK: Tensor,
    values_MSGK: Tensor,
    block_rows_B: Tensor,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
) -> Tensor:
    (B, X), (_, S, G, K) = proj_BX.shape, keys_MSGK.shape
    H = X // (2 * K) - G
    o_BO = proj_BX.new_empty(B, H * K)
    _run()(
        DTYPES[proj_BX.dtype],
        proj_BX.data_ptr(),
        proj_BX.stride(0),
        DTYPES[q_norm_weight_K.dtype],
        q_norm_weight_K.data_ptr(),
        k_norm_weight_K.data_ptr(),
        eps,
        frequencies_F.data_ptr(),
        rope_scale,
        positions_B.data_ptr(),
        keys_MSGK.data_ptr(),
        values_MSGK.data_ptr(),
        block_rows_B.data_ptr(),
        block_tables_BN.data_ptr(),
        block_tables_BN.stride(0),
        context_lens_B.data_ptr(),
        o_BO.data_ptr(),
        B,
        H,
        G,
        K,
        frequencies_F.shape[0],
        S,
        torch.get_num_threads(),
    )
    return o_BO
