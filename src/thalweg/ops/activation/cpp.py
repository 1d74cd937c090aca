"""SwiGLU activation on a CPU, in C++ (swiglu.cpp)."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.toolchain.cpu_build import DTYPES, function


@cache
def _run() -> Any:
    return function("silu_and_mul", c_int, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int)


def silu_and_mul(x_T2I: Tensor) -> Tensor:
    *leading, columns = x_T2I.shape
    rows = x_T2I if x_T2I.ndim == 2 else x_T2I.reshape(-1, columns)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    y_TI = rows.new_empty(rows.shape[0], columns // 2)
    _run()(
        DTYPES[rows.dtype],
        rows.data_ptr(),
        rows.stride(0),
        y_TI.data_ptr(),
        rows.shape[0],
        columns // 2,
        torch.get_num_threads(),
    )
    return y_TI if x_T2I.ndim == 2 else y_TI.view(*leading, columns // 2)
