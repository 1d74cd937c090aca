"""RMSNorm on a CPU, in C++ (rms.cpp)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.toolchain.cpu_build import DTYPES, function


@cache
def _run() -> Any:
    return function("rms_norm", c_int, c_void_p, c_int64, c_int, c_void_p, c_float, c_void_p, c_int64, c_int64, c_int)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    rows = x_TD if x_TD.ndim == 2 else x_TD.reshape(-1, x_TD.shape[-1])
    T, D = rows.shape
    y_TD = rows.new_empty(T, D)
    _run()(
        DTYPES[rows.dtype],
        rows.data_ptr(),
        rows.stride(0),
        DTYPES[weight_D.dtype],
        weight_D.data_ptr(),
        eps,
        y_TD.data_ptr(),
        T,
        D,
        torch.get_num_threads(),
    )
    return y_TD if x_TD.ndim == 2 else y_TD.view(x_TD.shape)
