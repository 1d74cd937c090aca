"""Norm and routing on a CPU, in C++ (router.cpp): of few tokens, and of many in panels."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thalweg.ops.moe.router.reference import empty_results, is_softmax
from thalweg.ops.toolchain.cpu_build import DTYPES, function

if TYPE_CHECKING:
    from thalweg.ops.moe.router import NormRouter


@cache
def _run() -> Any:
    x, norm, weights, results = (c_void_p, c_int64), (c_int, c_void_p, c_float), [c_void_p] * 2, [c_void_p] * 3
    return function(
        "norm_router", c_int, c_int, *x, *norm, *weights, *results, *[c_int64] * 7, *[c_int] * 3, c_float, c_int
    )


def _route(
    many: bool,
    x_TD: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    w_ED: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    renormalize: bool,
    scale: float,
    scoring: str = "sigmoid",
    n_group: int = 1,
    topk_group: int = 1,
    num_shared: int = 0,
    known_TD: Tensor | None = None,  # computed all the same
) -> tuple[Tensor, Tensor, Tensor]:
    (T, D), E = x_TD.shape, bias_E.shape[0]
    normed_TD, weights_Tk, ids_Tk = empty_results(x_TD, top_k + num_shared)
    _run()(
        many,
        DTYPES[x_TD.dtype],
        x_TD.data_ptr(),
        x_TD.stride(0),
        DTYPES[norm_weight_D.dtype],
        norm_weight_D.data_ptr(),
        eps,
        w_ED.data_ptr(),
        bias_E.data_ptr(),
        normed_TD.data_ptr(),
        weights_Tk.data_ptr(),
        ids_Tk.data_ptr(),
        T,
        D,
        E,
        top_k,
        n_group,
        topk_group,
        num_shared,
        is_softmax(scoring),
        renormalize,
        w_ED.shape[0] > E,
        scale,
        torch.get_num_threads(),
    )
    return normed_TD, weights_Tk, ids_Tk


norm_router: NormRouter = partial(_route, False)
norm_router_many: NormRouter = partial(_route, True)
