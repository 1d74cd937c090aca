"""Decode of latent attention on a CPU, in C++ (mixer.cpp)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.toolchain.cpu_build import DTYPES, function


@cache
def _run() -> Any:
    weights = (c_int, c_void_p, c_void_p, c_void_p, c_int64)
    cache = (c_void_p, c_void_p, c_int64, c_void_p, c_void_p)
    return function(
        "mla_mixer", c_int, c_void_p, c_int64, *weights, *cache, c_float, c_float, c_void_p, *[c_int64] * 7, c_int
    )


def mla_mixer_decode(
    proj_BX: Tensor,
    *,
    kv_norm_weight_R: Tensor,
    w_uk_HKR: Tensor,
    w_uv_HVR: Tensor,
    blocks_MSC: Tensor,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
    block_rows_B: Tensor,
    scale: float,
    eps: float,
) -> Tensor:
    B, (H, K, R), V, (_, S, C) = len(proj_BX), w_uk_HKR.shape, w_uv_HVR.shape[1], blocks_MSC.shape
    o_BO = proj_BX.new_empty(B, H * V)
    _run()(
        DTYPES[proj_BX.dtype],
        proj_BX.data_ptr(),
        proj_BX.stride(0),
        DTYPES[kv_norm_weight_R.dtype],
        kv_norm_weight_R.data_ptr(),
        w_uk_HKR.data_ptr(),
        w_uv_HVR.data_ptr(),
        w_uk_HKR.stride(0),
        blocks_MSC.data_ptr(),
        block_tables_BN.data_ptr(),
        block_tables_BN.stride(0),
        context_lens_B.data_ptr(),
        block_rows_B.data_ptr(),
        scale,
        eps,
        o_BO.data_ptr(),
        B,
        H,
        K,
        V,
        R,
        C - R,
        S,
        torch.get_num_threads(),
    )
    return o_BO
