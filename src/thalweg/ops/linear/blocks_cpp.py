"""Matrices in GGML's blocks for C++ on a CPU, and their products with few tokens (few.cpp) and many
(many.cpp)."""

from __future__ import annotations

from ctypes import Array, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thalweg.ops.norm.reference import rms_norm
from thalweg.ops.registry import Refusal
from thalweg.ops.toolchain.cpu_build import DTYPES, function
from thalweg.quant import GgmlRows
from thalweg.quant.ggml_types import TYPES

BLOCKS = ("Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")  # those that int8_types.h has code for
SERVED = (*BLOCKS, "F16", "BF16", "F32")  # and blocks.cpp


class Segments(NamedTuple):
    """How many segments a matrix has, their types' numbers, and how many rows each has."""

    segments: int
    types: Array[c_int32]
    rows: Array[c_int64]

    @staticmethod
    def of(scheme: GgmlRows) -> Segments:
        n = len(scheme.segments)
        types = (TYPES[name].id for name, _ in scheme.segments)
        return Segments(n, (c_int32 * n)(*types), (c_int64 * n)(*(rows for _, rows in scheme.segments)))


def refusal(scheme: GgmlRows, *, rounds: bool = False) -> Refusal:
    """Why C++ does not serve matrices stored so, or None; rounds: with activations rounded to 8 bits."""
    served = BLOCKS if rounds else SERVED
    unserved = sorted({name for name, _ in scheme.segments if name not in served})
    return f"has no code for {', '.join(unserved)}" if unserved else None


@cache
def _run(name: str) -> Any:
    matrix, norm = (c_void_p, c_int, c_void_p, c_void_p), (c_int, c_void_p, c_float)
    rest = (c_void_p, c_int64, c_void_p, *[c_int64] * 3, c_int)
    return function(name, c_int, c_void_p, c_int64, *matrix, c_int, *norm, *rest)


class BlockLinear:
    """y_TO = x @ w.T of w in GGML's blocks, as op "linear_ggml" says; rounds: of x rounded to 8 bits; many:
    for prompts."""

    def __init__(self, scheme: GgmlRows, *, rounds: bool = False, many: bool = False) -> None:
        self._name, self._rounds = "linear_ggml_many" if many else "linear_ggml", rounds
        self._segments, self._tile = Segments.of(scheme), scheme.tile
        self._rows = sum(rows for _, rows in scheme.segments)

    def __call__(
        self,
        x_TD: Tensor,
        blocks: Tensor,
        /,
        *,
        norm_weight_D: Tensor | None = None,
        eps: float = 0.0,
        residual_TO: Tensor | None = None,
    ) -> Tensor:
        if self._tile is not None and norm_weight_D is not None:
            x_TD, norm_weight_D = rms_norm(x_TD, norm_weight_D, eps), None
        if self._tile is not None:  # columns of w are in a file's order: x follows them
            R, G, V = self._tile
            x_TD = x_TD.unflatten(-1, (G, R, V)).transpose(-3, -2).flatten(-3)
        (T, D), O = x_TD.shape, self._rows
        y_TO = x_TD.new_empty(T, O)
        _run(self._name)(
            DTYPES[x_TD.dtype],
            x_TD.data_ptr(),
            x_TD.stride(0),
            blocks.data_ptr(),
            *self._segments,
            self._rounds,
            0 if norm_weight_D is None else DTYPES[norm_weight_D.dtype],
            None if norm_weight_D is None else norm_weight_D.data_ptr(),
            eps,
            None if residual_TO is None else residual_TO.data_ptr(),
            0 if residual_TO is None else residual_TO.stride(0),
            y_TO.data_ptr(),
            T,
            D,
            O,
            torch.get_num_threads(),
        )
        return y_TO
