"""The mixers of gated delta rules for prompts on a CPU, in C++ (prefill.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.host_tables import Boundaries
from thalweg.ops.toolchain.cpu_build import DTYPES, function

_SEQUENCES = (c_void_p, c_void_p, c_void_p, c_int64)


@cache
def _kda() -> Any:
    inputs, weights, sizes = (c_void_p, c_int64, c_void_p, c_int64, c_int64), [c_void_p] * 5, [c_int64] * 4
    types = (*inputs, *weights, c_float, c_void_p, *_SEQUENCES, c_void_p, *sizes, c_int)
    return function("kda_prefill", c_int, c_int, c_int, *types)


@cache
def _gdn() -> Any:
    weights, sizes = [c_void_p] * 5, [c_int64] * 6
    types = (c_void_p, c_int64, *weights, c_float, c_void_p, *_SEQUENCES, c_void_p, *sizes, c_int)
    return function("gdn_prefill", c_int, c_int, *types)


def kda_mixer_prefill(
    proj_TX: Tensor,
    up_T2O: Tensor,
    *,
    conv_weight_CW: Tensor,
    conv_state_NWC: Tensor,
    A_log_H: Tensor,
    dt_bias_HK: Tensor,
    norm_weight_V: Tensor,
    eps: float,
    state_NHVK: Tensor,
    slots_B: Tensor,
    offsets: Sequence[int],
    boundaries: Boundaries = (),
) -> Tensor:
    T, (H, K) = proj_TX.shape[0], dt_bias_HK.shape
    o_TO = proj_TX.new_empty(T, H * K)
    offsets_B1, boundaries_N3 = _on_host(offsets), _on_host(boundaries)
    _kda()(
        DTYPES[proj_TX.dtype],
        DTYPES[state_NHVK.dtype],
        DTYPES[norm_weight_V.dtype],
        proj_TX.data_ptr(),
        proj_TX.stride(0),
        up_T2O.data_ptr(),
        up_T2O.stride(0),
        up_T2O.stride(1),
        conv_weight_CW.data_ptr(),
        conv_state_NWC.data_ptr(),
        A_log_H.data_ptr(),
        dt_bias_HK.data_ptr(),
        norm_weight_V.data_ptr(),
        eps,
        state_NHVK.data_ptr(),
        slots_B.data_ptr(),
        offsets_B1.data_ptr(),
        boundaries_N3.data_ptr(),
        len(boundaries),
        o_TO.data_ptr(),
        len(offsets) - 1,
        H,
        K,
        conv_state_NWC.shape[1],
        torch.get_num_threads(),
    )
    return o_TO


def gdn_mixer_prefill(
    proj_TX: Tensor,
    *,
    conv_weight_CW: Tensor,
    conv_state_NWC: Tensor,
    A_log_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_V: Tensor,
    eps: float,
    state_NHVK: Tensor,
    slots_B: Tensor,
    offsets: Sequence[int],
    boundaries: Boundaries = (),
) -> Tensor:
    T, (_, H, V, K), (_, W, C) = proj_TX.shape[0], state_NHVK.shape, conv_state_NWC.shape
    o_TO = proj_TX.new_empty(T, H * V)
    offsets_B1, boundaries_N3 = _on_host(offsets), _on_host(boundaries)
    _gdn()(
        DTYPES[proj_TX.dtype],
        DTYPES[state_NHVK.dtype],
        proj_TX.data_ptr(),
        proj_TX.stride(0),
        conv_weight_CW.data_ptr(),
        conv_state_NWC.data_ptr(),
        A_log_H.data_ptr(),
        dt_bias_H.data_ptr(),
        norm_weight_V.data_ptr(),
        eps,
        state_NHVK.data_ptr(),
        slots_B.data_ptr(),
        offsets_B1.data_ptr(),
        boundaries_N3.data_ptr(),
        len(boundaries),
        o_TO.data_ptr(),
        len(offsets) - 1,
        (C - H * V) // (2 * K),
        H,
        K,
        V,
        W,
        torch.get_num_threads(),
    )
    return o_TO


def _on_host(values: Sequence[Any]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
