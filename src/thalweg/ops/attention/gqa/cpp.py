"""Gated attention on a CPU, in C++: of decode (decode.cpp) and of prompts (prefill.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
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


@cache
def _prepare() -> Any:
    norms, rotation = (c_int, c_void_p, c_void_p, c_float), (c_void_p, c_float, c_void_p)
    types = (c_void_p, c_int64, *norms, *rotation, c_void_p, c_void_p, c_void_p, c_void_p, *[c_int64] * 5, c_int)
    return function("gqa_prepare", c_int, *types)


@cache
def _prefill() -> Any:
    inputs, blocks = (c_void_p, c_void_p, c_int64), (c_void_p, c_void_p, c_void_p, c_int64)
    return function("gqa_prefill", c_int, *inputs, *blocks, c_void_p, c_void_p, c_void_p, *[c_int64] * 5, c_int)


def gqa_prepare(
    proj_TX: Tensor,
    *,
    q_norm_weight_K: Tensor,
    k_norm_weight_K: Tensor,
    eps: float,
    frequencies_F: Tensor,
    rope_scale: float,
    positions_T: Tensor,
    keys_MSGK: Tensor,
    values_MSGK: Tensor,
    block_rows_T: Tensor,
) -> Tensor:
    (T, X), (G, K) = proj_TX.shape, keys_MSGK.shape[2:]
    H = X // (2 * K) - G
    q_THK = proj_TX.new_empty(T, H, K)
    _prepare()(
        DTYPES[proj_TX.dtype],
        proj_TX.data_ptr(),
        proj_TX.stride(0),
        DTYPES[q_norm_weight_K.dtype],
        q_norm_weight_K.data_ptr(),
        k_norm_weight_K.data_ptr(),
        eps,
        frequencies_F.data_ptr(),
        rope_scale,
        positions_T.data_ptr(),
        keys_MSGK.data_ptr(),
        values_MSGK.data_ptr(),
        block_rows_T.data_ptr(),
        q_THK.data_ptr(),
        T,
        H,
        G,
        K,
        frequencies_F.shape[0],
        torch.get_num_threads(),
    )
    return q_THK


def gqa_prefill(
    q_THK: Tensor,
    proj_TX: Tensor,
    *,
    keys_MSGK: Tensor,
    values_MSGK: Tensor,
    block_tables_BN: Tensor,
    starts: Sequence[int],
    offsets: Sequence[int],
) -> Tensor:
    (T, H, K), (_, S, G, _) = q_THK.shape, keys_MSGK.shape
    q_THK, o_TO = q_THK.contiguous(), q_THK.new_empty(T, H * K)
    starts_B, offsets_B1 = (torch.tensor(list(n), dtype=torch.int64) for n in (starts, offsets))
    _prefill()(
        DTYPES[q_THK.dtype],
        q_THK.data_ptr(),
        proj_TX.data_ptr(),
        proj_TX.stride(0),
        keys_MSGK.data_ptr(),
        values_MSGK.data_ptr(),
        block_tables_BN.data_ptr(),
        block_tables_BN.stride(0),
        starts_B.data_ptr(),
        offsets_B1.data_ptr(),
        o_TO.data_ptr(),
        len(offsets) - 1,
        H,
        G,
        K,
        S,
        torch.get_num_threads(),
    )
    return o_TO
