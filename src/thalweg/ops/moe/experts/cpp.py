"""Experts of few tokens on a CPU, in C++ (few.cpp), over weights in the model's dtype."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.toolchain.cpu_build import DTYPES, function


@cache
def _run() -> Any:
    x, routing, residual, sizes = (c_void_p, c_int64), [c_void_p] * 2, (c_void_p, c_int64), [c_int64] * 5
    return function("experts", c_int, *x, *routing, c_void_p, c_void_p, *residual, c_void_p, *sizes, c_int)


def experts(
    x_TD: Tensor,
    weights_Tk: Tensor,
    ids_Tk: Tensor,
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    *,
    residual_TD: Tensor | None = None,
    num_shared: int = 0,
    own: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    (T, k), (E, D, I) = ids_Tk.shape, down[0].shape
    y_TD = x_TD.new_empty(T, D)
    served = _run()(
        DTYPES[x_TD.dtype],
        x_TD.data_ptr(),
        x_TD.stride(0),
        weights_Tk.data_ptr(),
        ids_Tk.data_ptr(),
        gate_up[0].data_ptr(),
        down[0].data_ptr(),
        None if residual_TD is None else residual_TD.data_ptr(),
        0 if residual_TD is None else residual_TD.stride(0),
        y_TD.data_ptr(),
        T,
        k,
        E,
        D,
        I,
        torch.get_num_threads(),
    )
    if not served:
        raise IndexError(f"ids of experts are {ids_Tk.min()} to {ids_Tk.max()}; expected 0 to {E - 1}")
    return y_TD
