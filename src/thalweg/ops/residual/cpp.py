"""Op "gated_add" on a CPU, in C++ (gated.cpp)."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

from torch import Tensor

from thalweg.ops.toolchain.cpu_build import DTYPES, function


@cache
def _run() -> Any:
    a, gate = (c_void_p,), (c_void_p, c_int64)
    return function("gated_add", c_int, c_void_p, c_int64, *a, *gate, c_void_p, c_int64, c_int64)


def gated_add(residual_TD: Tensor, a_TD: Tensor, gate_T1: Tensor | None) -> Tensor:
    T, D = a_TD.shape
    y_TD = a_TD.new_empty(T, D)
    _run()(
        DTYPES[a_TD.dtype],
        residual_TD.data_ptr(),
        residual_TD.stride(0),
        a_TD.data_ptr(),
        None if gate_T1 is None else gate_T1.data_ptr(),
        0 if gate_T1 is None else gate_T1.stride(0),
        y_TD.data_ptr(),
        T,
        D,
    )
    return y_TD
