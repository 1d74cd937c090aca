"""Linear projections on a CPU, in C++: of few tokens (few.cpp), and of many in panels (many.cpp)."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.toolchain.cpu_build import DTYPES, function


@cache
def _run(name: str) -> Any:
    sizes = (c_int64, c_int64, c_int64, c_int)
    norm, residual, y = (c_int, c_void_p, c_float), (c_void_p, c_int64), (c_void_p, c_int64)
    return function(name, c_int, c_void_p, c_int64, c_void_p, *norm, *residual, *y, *sizes)


def linear(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    return _product("linear", x_TD, w_OD, x_TD.new_empty(x_TD.shape[0], w_OD.shape[0]))


def norm_linear(x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_OD: Tensor) -> Tensor:
    return _product("linear", x_TD, w_OD, x_TD.new_empty(x_TD.shape[0], w_OD.shape[0]), norm_weight_D, eps)


def linear_add(x_TD: Tensor, w_OD: Tensor, residual_TO: Tensor) -> Tensor:
    """The residual is overwritten with the result."""
    return _product("linear", x_TD, w_OD, residual_TO, residual_TO=residual_TO)


def linear_many(x_TD: Tensor, w_OD: Tensor) -> Tensor:
    return _product("linear_many", x_TD, w_OD, x_TD.new_empty(x_TD.shape[0], w_OD.shape[0]))


def norm_linear_many(x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_OD: Tensor) -> Tensor:
    return _product("linear_many", x_TD, w_OD, x_TD.new_empty(x_TD.shape[0], w_OD.shape[0]), norm_weight_D, eps)


def linear_add_many(x_TD: Tensor, w_OD: Tensor, residual_TO: Tensor) -> Tensor:
    """The residual is overwritten with the result."""
    return _product("linear_many", x_TD, w_OD, residual_TO, residual_TO=residual_TO)


def batched_projection(x_T2R: Tensor, w_2OR: Tensor) -> Tensor:
    y_T2O = x_T2R.new_empty(len(x_T2R), *w_2OR.shape[:2])
    for i in range(2):
        _product("linear_many", x_T2R[:, i], w_2OR[i], y_T2O[:, i])
    return y_T2O


def _product(
    name: str,
    x_TD: Tensor,
    w_OD: Tensor,
    y_TO: Tensor,
    norm_weight_D: Tensor | None = None,
    eps: float = 0.0,
    residual_TO: Tensor | None = None,
) -> Tensor:
    (T, D), dtype = x_TD.shape, DTYPES[x_TD.dtype]
    _run(name)(
        dtype,
        x_TD.data_ptr(),
        x_TD.stride(0),
        w_OD.data_ptr(),
        dtype if norm_weight_D is None else DTYPES[norm_weight_D.dtype],
        None if norm_weight_D is None else norm_weight_D.data_ptr(),
        eps,
        None if residual_TO is None else residual_TO.data_ptr(),
        0 if residual_TO is None else residual_TO.stride(0),
        y_TO.data_ptr(),
        y_TO.stride(0),
        T,
        D,
        w_OD.shape[0],
        torch.get_num_threads(),
    )
    return y_TO
