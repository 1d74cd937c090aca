"""The decode mixers of gated delta rules on a CPU, in C++ (mixer.cpp)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.toolchain.cpu_build import DTYPES, function


@cache
def _kda() -> Any:
    weights, sizes = [c_void_p] * 6, [c_int64] * 5
    types = (c_void_p, c_int64, *weights, c_float, c_void_p, c_void_p, c_void_p, *sizes, c_int)
    return function("kda_mixer", c_int, c_int, c_int, *types)


@cache
def _gdn() -> Any:
    weights, sizes = [c_void_p] * 5, [c_int64] * 6
    types = (c_void_p, c_int64, *weights, c_float, c_void_p, c_void_p, c_void_p, *sizes, c_int)
    return function("gdn_mixer", c_int, c_int, *types)


def kda_mixer_decode(
    proj_BX: Tensor,
    *,
    conv_weight_CW: Tensor,
    conv_state_NWC: Tensor,
    w_up_2OR: Tensor,
    A_log_H: Tensor,
    dt_bias_HK: Tensor,
    norm_weight_V: Tensor,
    eps: float,
    state_NHVK: Tensor,
    slots_B: Tensor,
) -> Tensor:
    B, (H, K) = proj_BX.shape[0], dt_bias_HK.shape
    o_BO = proj_BX.new_empty(B, H * K)
    _kda()(
        DTYPES[proj_BX.dtype],
        DTYPES[state_NHVK.dtype],
        DTYPES[norm_weight_V.dtype],
        proj_BX.data_ptr(),
        proj_BX.stride(0),
        conv_weight_CW.data_ptr(),
        conv_state_NWC.data_ptr(),
        w_up_2OR.data_ptr(),
        A_log_H.data_ptr(),
        dt_bias_HK.data_ptr(),
        norm_weight_V.data_ptr(),
        eps,
        state_NHVK.data_ptr(),
        slots_B.data_ptr(),
        o_BO.data_ptr(),
        B,
        H,
        K,
        w_up_2OR.shape[2],
        conv_state_NWC.shape[1],
        torch.get_num_threads(),
    )
    return o_BO


def gdn_mixer_decode(
    proj_BX: Tensor,
    *,
    conv_weight_CW: Tensor,
    conv_state_NWC: Tensor,
    A_log_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_V: Tensor,
    eps: float,
    state_NHVK: Tensor,
    slots_B: Tensor,
) -> Tensor:
    B, (_, H, V, K), (_, W, C) = proj_BX.shape[0], state_NHVK.shape, conv_state_NWC.shape
    o_BO = proj_BX.new_empty(B, H * V)
    _gdn()(
        DTYPES[proj_BX.dtype],
        DTYPES[state_NHVK.dtype],
        proj_BX.data_ptr(),
        proj_BX.stride(0),
        conv_weight_CW.data_ptr(),
        conv_state_NWC.data_ptr(),
        A_log_H.data_ptr(),
        dt_bias_H.data_ptr(),
        norm_weight_V.data_ptr(),
        eps,
        state_NHVK.data_ptr(),
        slots_B.data_ptr(),
        o_BO.data_ptr(),
        B,
        (C - H * V) // (2 * K),
        H,
        K,
        V,
        W,
        torch.get_num_threads(),
    )
    return o_BO
