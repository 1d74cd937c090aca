"""Linear projections on a CPU, in C++: of few tokens, and of many in panels."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.toolchain.cpu_build import DTYPES, function

Layout = tuple[Any, Any, Any]  # of a weight in GGML's blocks: its Segments (blocks_cpp.py)
PLAIN_LAYOUT: Layout = (0, None, None)  # of one in the model's dtype


@cache
def _run() -> Any:
    matrix, norm = (c_void_p, c_int, c_void_p, c_void_p), (c_int, c_void_p, c_float)
    residual, y, sizes = (c_void_p, c_int64), (c_void_p, c_int64), [c_int64] * 3
    return function("linear", c_int, c_void_p, c_int64, *matrix, c_int, c_int, *norm, *residual, *y, *sizes, c_int)


def linear(x_TD: Tensor, w_OD: Tensor, *, many: bool = False) -> Tensor:
    """many: in panels, as the functions below."""
    return product(x_TD, w_OD, x_TD.new_empty(x_TD.shape[0], w_OD.shape[0]), many=many)


def norm_linear(x_TD: Tensor, norm_weight_D: Tensor, eps: float, w_OD: Tensor, *, many: bool = False) -> Tensor:
    y_TO = x_TD.new_empty(x_TD.shape[0], w_OD.shape[0])
    return product(x_TD, w_OD, y_TO, norm_weight_D=norm_weight_D, eps=eps, many=many)


def linear_add(x_TD: Tensor, w_OD: Tensor, residual_TO: Tensor, *, many: bool = False) -> Tensor:
    """The residual is overwritten with the result."""
    return product(x_TD, w_OD, residual_TO, residual_TO=residual_TO, many=many)


def batched_projection(x_T2R: Tensor, w_2OR: Tensor) -> Tensor:
    y_T2O = x_T2R.new_empty(len(x_T2R), *w_2OR.shape[:2])
    for i in range(2):
        product(x_T2R[:, i], w_2OR[i], y_T2O[:, i], many=True)
    return y_T2O


def product(
    x_TD: Tensor,
    w: Tensor,
    y_TO: Tensor,
    *,
    layout: Layout = PLAIN_LAYOUT,
    rounds: bool = False,
    many: bool = False,
    norm_weight_D: Tensor | None = None,
    eps: float = 0.0,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """y, overwritten with what op "linear_ggml" says of w, which lies as the layout says. rounds: x is rounded to 8
    bits."""
    (T, D), dtype = x_TD.shape, DTYPES[x_TD.dtype]
    _run()(
        dtype,
        x_TD.data_ptr(),
        x_TD.stride(0),
        w.data_ptr(),
        *layout,
        rounds,
        many,
        dtype if norm_weight_D is None else DTYPES[norm_weight_D.dtype],
        None if norm_weight_D is None else norm_weight_D.data_ptr(),
        eps,
        None if residual_TO is None else residual_TO.data_ptr(),
        0 if residual_TO is None else residual_TO.stride(0),
        y_TO.data_ptr(),
        y_TO.stride(0),
        T,
        D,
        y_TO.shape[1],
        torch.get_num_threads(),
    )
    return y_TO
