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
    rotation = (c_void_p, c_void_p, c_float)
    types = (c_void_p, c_int64, *weights, *cache, c_float, c_float, *rotation, c_void_p, *[c_int64] * 7, c_int)
    return function("mla_decode", c_int, *types)


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
    return _decode(
        proj_BX,
        (DTYPES[kv_norm_weight_R.dtype], kv_norm_weight_R.data_ptr()),
        w_uk_HKR,
        w_uv_HVR,
        blocks_MSC,
        block_tables_BN,
        context_lens_B,
        block_rows_B.data_ptr(),
        scale,
        eps,
        (None, None, 1.0),
    )


def mla_decode(
    q_BO: Tensor,
    *,
    positions_B: Tensor,
    frequencies_F: Tensor,
    rope_scale: float,
    w_uk_HKR: Tensor,
    w_uv_HVR: Tensor,
    blocks_MSC: Tensor,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
    scale: float,
) -> Tensor:
    return _decode(
        q_BO,
        (DTYPES[q_BO.dtype], None),
        w_uk_HKR,
        w_uv_HVR,
        blocks_MSC,
        block_tables_BN,
        context_lens_B,
        None,
        scale,
        0.0,
        (positions_B.data_ptr(), frequencies_F.data_ptr(), rope_scale),
    )


def _decode(
    x_BX: Tensor,
    norm: tuple[int, int | None],
    w_uk_HKR: Tensor,
    w_uv_HVR: Tensor,
    blocks_MSC: Tensor,
    block_tables_BN: Tensor,
    context_lens_B: Tensor,
    block_rows: int | None,
    scale: float,
    eps: float,
    rotation: tuple[int | None, int | None, float],
) -> Tensor:
    B, (H, K, R), V, (_, S, C) = x_BX.shape[0], w_uk_HKR.shape, w_uv_HVR.shape[1], blocks_MSC.shape
    o_BO = x_BX.new_empty(B, H * V)
    _run()(
        DTYPES[x_BX.dtype],
        x_BX.data_ptr(),
        x_BX.stride(0),
        *norm,
        w_uk_HKR.data_ptr(),
        w_uv_HVR.data_ptr(),
        w_uk_HKR.stride(0),
        blocks_MSC.data_ptr(),
        block_tables_BN.data_ptr(),
        block_tables_BN.stride(0),
        context_lens_B.data_ptr(),
        block_rows,
        scale,
        eps,
        *rotation,
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
