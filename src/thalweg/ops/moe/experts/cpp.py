"""Experts on a CPU, in C++, over weights in the model's dtype or in GGML's blocks: of few tokens, and of many in
panels."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from thalweg.ops.linear.blocks_cpp import Segments, refusal
from thalweg.ops.linear.cpp import PLAIN_LAYOUT, Layout
from thalweg.ops.moe.experts import ExpertsDims
from thalweg.ops.registry import Refusal
from thalweg.ops.toolchain.cpu_build import DTYPES, function
from thalweg.quant import PLAIN, GgmlRows


def build(dims: ExpertsDims, *, rounds: bool = False, many: bool = False) -> Callable[..., Tensor]:
    """rounds: whether activations are rounded to 8 bits before they are multiplied with GGML's blocks. many: for
    prompts."""
    form = partial(experts, many=many)
    if dims.scheme == PLAIN.name:
        return form
    schemes = _schemes(dims)
    gate_up, down = Segments.of(schemes[0]), Segments.of(schemes[-1])
    return partial(form, inner=dims.I, gate_up_layout=gate_up, down_layout=down, rounds=rounds)


def refuses(dims: ExpertsDims, *, rounds: bool = False) -> Refusal:
    """Why it does not serve these dims on any CPU, or None."""
    if dims.own:
        return "has no products for an expert of its own"
    if dims.scheme == PLAIN.name:
        return None
    schemes = _schemes(dims)
    if len(schemes) < dims.scheme.count("|") + 1:
        return f"needs weights in the model's dtype or in GGML's blocks, not {dims.scheme}"
    return next(filter(None, (refusal(scheme, rounds=rounds) for scheme in schemes)), None)


def _schemes(dims: ExpertsDims) -> list[GgmlRows]:
    """Those that are GGML's."""
    return [scheme for name in dims.scheme.split(" | ") if (scheme := GgmlRows.named(name)) is not None]


@cache
def _run() -> Any:
    x, routing, residual, sizes = (c_void_p, c_int64), [c_void_p] * 2, (c_void_p, c_int64), [c_int64] * 5
    weight = (c_void_p, c_int, c_void_p, c_void_p)
    return function("experts", c_int, *x, *routing, *weight, *weight, c_int, c_int, *residual, c_void_p, *sizes, c_int)


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
    inner: int | None = None,
    gate_up_layout: Layout = PLAIN_LAYOUT,
    down_layout: Layout = PLAIN_LAYOUT,
    rounds: bool = False,
    many: bool = False,
) -> Tensor:
    (T, k), E, D = ids_Tk.shape, down[0].shape[0], x_TD.shape[1]
    I = down[0].shape[2] if inner is None else inner
    y_TD = x_TD.new_empty(T, D)
    served = _run()(
        DTYPES[x_TD.dtype],
        x_TD.data_ptr(),
        x_TD.stride(0),
        weights_Tk.data_ptr(),
        ids_Tk.data_ptr(),
        gate_up[0].data_ptr(),
        *gate_up_layout,
        down[0].data_ptr(),
        *down_layout,
        rounds,
        many,
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
